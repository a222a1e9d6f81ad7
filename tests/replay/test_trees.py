import numpy as np
import pytest

from shiq_jax.replay import pack, pack_groups, plan
from shiq_jax.replay.trees import Trees


def test_a_tree_is_built_once_for_the_plan_and_all_batches(make_groups, make_buffer, builds):
    buffer = make_buffer(make_groups(np.random.default_rng(0), groups=12))
    drawn, trees = pack_groups(buffer, "trajectory"), Trees(buffer)
    shape = plan(trees, drawn, batch_size=4)
    packed = [pack(part, trees, shape) for _ in range(2) for part in (drawn[:4], drawn[4:])]
    assert len(builds) == len(drawn) == 12
    fresh = pack(drawn[:4], buffer, shape)
    for one in (packed[0], packed[2]):
        np.testing.assert_array_equal(one.batch.tokens, fresh.batch.tokens)
        np.testing.assert_array_equal(one.batch.gather, fresh.batch.gather)
        np.testing.assert_array_equal(one.batch.example.rewards, fresh.batch.example.rewards)


@pytest.mark.parametrize("room", [0, 20_000])
def test_what_has_no_room_is_built_anew(room, make_groups, make_buffer, builds):
    buffer = make_buffer(make_groups(np.random.default_rng(0), groups=12))
    drawn, trees = pack_groups(buffer, "trajectory"), Trees(buffer, room)
    for _ in range(2):
        for pack_group in drawn:
            assert trees[pack_group].pack_group == pack_group
    assert len(builds) == 24 if room == 0 else 12 < len(builds) < 24


def test_groups_that_fit_into_a_row_are_not_read_to_be_split(make_groups, make_buffer, monkeypatch):
    buffer = make_buffer(make_groups(np.random.default_rng(0), groups=12))
    expected = pack_groups(buffer, "trajectory")
    monkeypatch.setattr(type(buffer), "__getitem__", lambda *_: pytest.fail("read"))
    assert pack_groups(buffer, "trajectory", row_length=10_000) == expected
