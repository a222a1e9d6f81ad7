"""Shuffled schedules, and the pack groups of each unit."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shiq_jax.replay import Buffer, Record, Schedule, pack_groups
from shiq_jax.replay.trie import build_trie


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 40), batch=st.integers(1, 50), seed=st.integers(0, 2**64 - 1), epochs=st.integers(1, 4))
def test_every_epoch_visits_each_item_once(size, batch, seed, epochs):
    schedule = Schedule(size, batch, seed)
    items = np.concatenate([schedule.indices(step) for step in range(schedule.steps(epochs))])
    assert items.dtype == np.int64
    for epoch in range(epochs):
        assert sorted(items[epoch * size : (epoch + 1) * size]) == list(range(size))
    assert (schedule.steps(epochs) - 1) * batch < epochs * size <= schedule.steps(epochs) * batch


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32), steps=st.lists(st.integers(0, 60), min_size=1, max_size=12))
def test_schedule_is_stateless(seed, steps):
    schedule = Schedule(17, 5, seed)
    for step in steps:
        np.testing.assert_array_equal(schedule.indices(step), Schedule(17, 5, seed).indices(step))


def test_orders_are_uniform_and_depend_on_seed_and_epoch():
    size = 50
    first, second = Schedule(size, size, 3).indices(0), Schedule(size, size, 3).indices(1)
    other_seed = Schedule(size, size, 4).indices(0)
    assert (
        not np.array_equal(first, second)
        and not np.array_equal(first, other_seed)
        and not np.array_equal(second, other_seed)
    )
    counts = Counter(tuple(Schedule(3, 3, seed).indices(0)) for seed in range(1200))
    assert len(counts) == 6
    # A chi-square statistic with 5 degrees of freedom exceeds 20.5 with probability 0.001.
    assert sum((count - 200) ** 2 / 200 for count in counts.values()) < 20.5


def test_order_is_pinned():
    # A different order would break every resumed run.
    assert Schedule(8, 8, 0).indices(0).tolist() == [0, 2, 1, 5, 4, 3, 6, 7]
    assert Schedule(8, 8, 2**63 + 1).indices(5).tolist() == [0, 2, 5, 4, 3, 7, 6, 1]


@pytest.mark.parametrize(
    "arguments, name", [((0, 1, 0), "size"), ((1, 0, 0), "batch_size"), ((1, 1, -1), "seed"), ((1, 1, 2**64), "seed")]
)
def test_invalid_schedules_are_rejected(arguments, name):
    with pytest.raises(ValueError, match=f"^{name} is"):
        Schedule(*arguments)


def test_steps_of_fractional_epochs():
    assert Schedule(30, 1, 0).steps(0.1) == 3 and Schedule(30, 4, 0).steps(0.5) == 4


def test_negative_steps_are_rejected():
    with pytest.raises(ValueError, match="step is -1"):
        Schedule(3, 1, 0).indices(-1)


def buffer_of(make_buffer, rewards):
    """A buffer of records with the given (group, reward) and a shared first token."""
    return make_buffer(
        [Record(tokens=[1, k], action_mask=[0, 1], rewards=[r], group=g) for k, (g, r) in enumerate(rewards)]
    )


def test_pack_groups_of_each_unit(make_buffer):
    buffer = buffer_of(make_buffer, [("a", 1), ("b", 5), ("a", 3), ("a", 3), ("c", 2), ("b", 5), ("a", 1)])
    assert pack_groups(buffer, "trajectory") == [((0,), (2,), (3,), (6,)), ((1,), (5,)), ((4,),)]
    assert pack_groups(buffer, "trajectory", share_prompts=False) == [((k,),) for k in range(7)]
    assert pack_groups(buffer, "trajectory", max_examples=3) == [((0,), (2,), (3,)), ((6,),), ((1,), (5,)), ((4,),)]
    assert pack_groups(buffer, "group") == [((0, 2, 3, 6),), ((1, 5),), ((4,),)]
    pairs = pack_groups(buffer, "pair")
    assert pairs == [((2, 0),)] and pairs.skipped == 2
    assert pack_groups(buffer, "group").skipped == 0


def test_pairs_use_feedback_before_returns(make_buffer):
    """`chosen` takes precedence over ranks, and ranks over returns unless there are scores."""
    groups = {
        "chosen and rejected": [({"chosen": False}, 5), ({"chosen": True}, 1), ({"chosen": True}, 9), ({}, 7)],
        "chosen only": [({"chosen": True}, 1), ({}, 0)],
        "ranks": [({"rank": 2.0}, 9), ({"rank": 3.0}, 1), ({"rank": 1.0}, 0), ({"rank": 1.0}, 5)],
        "equal ranks": [({"rank": 1.0}, 1), ({"rank": 1.0}, 2)],
        "missing rank": [({"rank": 1.0}, 1), ({}, 2)],
        "scores": [({"rank": 1.0, "score": 1.0}, 1), ({"rank": 2.0, "score": 4.0}, 4)],
    }
    records = [
        Record(tokens=[1, number], action_mask=[0, 1], rewards=[reward], group=group, **feedback)
        for group, members in groups.items()
        for number, (feedback, reward) in enumerate(members)
    ]
    pairs = pack_groups(make_buffer(records), "pair")
    assert pairs == [((1, 0),), ((8, 7),), ((13, 12),), ((15, 14),)] and pairs.skipped == 2


@settings(max_examples=40, deadline=None)
@given(
    lists=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=8), min_size=1, max_size=10),
    row_length=st.integers(9, 20),
    max_examples=st.none() | st.integers(1, 4),
)
def test_split_groups_fit_a_row_and_keep_every_record(lists, row_length, max_examples, tmp_path_factory):
    buffer = Buffer.create(tmp_path_factory.mktemp("split") / "buffer")
    buffer.append(
        Record(tokens=[1, *tokens], action_mask=[0] + [1] * len(tokens), rewards=[0.0] * len(tokens), group="g")
        for tokens in lists
    )
    parts = pack_groups(buffer, "trajectory", max_examples=max_examples, row_length=row_length)
    assert sorted(number for part in parts for (number,) in part) == list(range(len(lists)))
    for part in parts:
        assert len(part) <= (max_examples or len(lists))
        assert (
            len(build_trie([record.tokens for record in buffer.read([number for (number,) in part])]).tokens)
            <= row_length
        )
    if (
        max_examples is None
        and len(build_trie([record.tokens for record in buffer.read(range(len(buffer)))]).tokens) <= row_length
    ):
        assert len(parts) == 1, "a group that fits must not be split"


def test_invalid_arguments_are_rejected(make_buffer):
    buffer = buffer_of(make_buffer, [("a", 1)])
    with pytest.raises(ValueError, match="unit is 'triple'; choose one of trajectory, pair, group"):
        pack_groups(buffer, "triple")
    with pytest.raises(ValueError, match="share_prompts=False"):
        pack_groups(buffer, "pair", share_prompts=False)
    for name in ("max_examples", "row_length"):
        with pytest.raises(ValueError, match=f"{name} is 0"):
            pack_groups(buffer, "trajectory", **{name: 0})
