"""Cache of packed trees: each is built once while it fits the cache, and only when needed."""

import chex
import numpy as np
import pytest

from shiq_jax.replay import pack, pack_groups, plan
from shiq_jax.replay.trees import Trees


def test_each_tree_is_built_once(make_groups, make_buffer, build_calls):
    buffer = make_buffer(make_groups(np.random.default_rng(0), groups=12))
    groups, trees = pack_groups(buffer, "trajectory"), Trees(buffer)
    shape = plan(trees, groups, batch_size=4)
    packed = [pack(batch, trees, shape) for _ in range(2) for batch in (groups[:4], groups[4:])]
    assert len(build_calls) == len(groups) == 12
    uncached = pack(groups[:4], buffer, shape)
    for cached in (packed[0], packed[2]):
        chex.assert_trees_all_equal(cached.batch, uncached.batch)


@pytest.mark.parametrize("cache_bytes", [0, 20_000])
def test_trees_beyond_the_cache_size_are_rebuilt(cache_bytes, make_groups, make_buffer, build_calls):
    buffer = make_buffer(make_groups(np.random.default_rng(0), groups=12))
    groups, trees = pack_groups(buffer, "trajectory"), Trees(buffer, cache_bytes)
    for _ in range(2):
        for pack_group in groups:
            assert trees[pack_group].pack_group == pack_group
    assert len(build_calls) == 24 if cache_bytes == 0 else 12 < len(build_calls) < 24


def test_groups_that_fit_a_row_are_not_read(make_groups, make_buffer, monkeypatch):
    buffer = make_buffer(make_groups(np.random.default_rng(0), groups=12))
    expected = pack_groups(buffer, "trajectory")
    monkeypatch.setattr(type(buffer), "__getitem__", lambda *_: pytest.fail("a record was read"))
    assert pack_groups(buffer, "trajectory", row_length=10_000) == expected
