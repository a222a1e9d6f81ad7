"""Packing of tries into rows: contents, intervals, shared prompts, row counts and invalid input."""

import chex
import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shiq_jax.errors import UserError
from shiq_jax.replay import BatchShape, Buffer, Record, Schedule, pack, pack_groups, plan, row_count


def attention_mask(intervals):
    """bool[rows, L, L]: whether each query (middle axis) sees each key (last axis), by the documented rule."""
    index = np.arange(intervals.shape[1])
    enter, end = intervals[..., 0], intervals[..., 1]
    return (index <= index[:, None]) & (enter[:, None, :] <= enter[:, :, None]) & (enter[:, :, None] < end[:, None, :])


def make_statistics(records):
    return [
        (np.arange(len(r.rewards), dtype=np.float32) - 100 * k, np.arange(len(r.rewards)) + 0.5 + k)
        for k, r in enumerate(records)
    ]


def check_batch(packed, records, pack_groups, shape, statistics):
    """Compare a batch with each of its sequences alone."""
    batch, members = packed.batch, packed.members
    visible = attention_mask(batch.intervals)
    assert np.all(visible[:, np.arange(shape.length), np.arange(shape.length)]), "every token must see itself"
    examples = []
    for row, slot in np.argwhere(batch.real):
        example = tuple(int(number) for number in members[row, slot] if number >= 0)
        examples.append(example)
        for k, number in enumerate(example):
            record, gather = records[number], batch.gather[row, slot, k]
            count = len(record.rewards)
            assert np.all(gather[:count] >= 0) and np.all(gather[count:] == -1)
            assert batch.targets[row, gather[:count]].tolist() == record.tokens[record.action_mask].tolist()
            for action, position in zip(gather[:count], np.flatnonzero(record.action_mask), strict=True):
                context = np.flatnonzero(visible[row, batch.predictors[row, action]])
                assert batch.tokens[row, context].tolist() == record.tokens[:position].tolist()
                assert batch.positions[row, context].tolist() == list(range(position))
            np.testing.assert_array_equal(batch.example.rewards[row, slot, k, :count], record.rewards)
            reference = batch.example.references["reference"]
            np.testing.assert_array_equal(reference.logp[row, slot, k, :count], statistics[number][0])
            np.testing.assert_array_equal(reference.lse[row, slot, k, :count], statistics[number][1])
    assert sorted(examples) == sorted(example for pack_group in pack_groups for example in pack_group)
    np.testing.assert_array_equal(batch.example.action_mask, batch.gather >= 0)
    padding = batch.gather < 0
    for values in (
        batch.example.rewards,
        batch.example.references["reference"].logp,
        batch.example.references["reference"].lse,
    ):
        assert np.all(values[padding] == 0)
    assert np.all(members[~batch.real] == -1) and np.all(padding[~batch.real])


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    unit=st.sampled_from(["trajectory", "pair", "group"]),
    batch_size=st.integers(1, 6),
    multiple=st.integers(1, 3),
)
def test_packed_sequences_equal_the_records(make_groups, tmp_path_factory, seed, unit, batch_size, multiple):
    rng = np.random.default_rng(seed)
    records = make_groups(rng)
    buffer = Buffer.create(tmp_path_factory.mktemp("packing") / "buffer")
    buffer.append(records)
    groups = pack_groups(buffer, unit)
    if not groups:
        assert groups.skipped == len(set(buffer.group_ids()))
        return
    shape = plan(buffer, groups, multiple=8)
    statistics = make_statistics(records)
    schedule = Schedule(len(groups), batch_size, seed)
    for step in range(3):
        batch = [groups[index] for index in schedule.indices(step)]
        packed = pack(batch, buffer, shape, references={"reference": statistics}, rows_multiple=multiple)
        rows = len(packed.batch.tokens)
        assert rows % multiple == 0
        assert packed.batch.tokens.shape == (rows, shape.length) and packed.batch.predictors.shape == (
            rows,
            shape.actions,
        )
        assert packed.batch.gather.shape == (rows, shape.slots, shape.sequences, shape.steps)
        check_batch(packed, records, batch, shape, statistics)


def short_record(tokens, actions, group="g", reward=0.0):
    mask = np.arange(len(tokens)) >= len(tokens) - actions
    return Record(tokens=tokens, action_mask=mask, rewards=[reward] * actions, group=group)


def test_packed_row_by_hand():
    records = [
        short_record([9, 1, 2, 3], 2),
        short_record([9, 1, 4], 1),
        short_record([9, 1, 2, 5], 2),
        short_record([7, 8], 1, "h"),
    ]
    packed = pack([((0,), (1,), (2,)), ((3,),)], records, BatchShape(10, 6, 5, 1, 3))
    batch = packed.batch
    assert batch.tokens.tolist() == [[9, 1, 2, 3, 5, 4, 7, 8, 0, 0]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 3, 2, 0, 1, 0, 0]]
    assert batch.intervals[0].tolist() == [
        [0, 3],
        [0, 3],
        [0, 2],
        [0, 1],
        [1, 2],
        [2, 3],
        [3, 4],
        [3, 4],
        [4, 5],
        [4, 5],
    ]
    # Distinct actions: 2 (shared by two sequences), 3, 5, 4, 8.
    assert batch.predictors.tolist() == [[1, 2, 2, 1, 6, 0]] and batch.targets.tolist() == [[2, 3, 5, 4, 8, 0]]
    assert batch.gather[0, :, 0].tolist() == [[0, 1, -1], [3, -1, -1], [0, 2, -1], [4, -1, -1], [-1, -1, -1]]
    assert batch.real.tolist() == [[True, True, True, True, False]]
    assert packed.members[0, :, 0].tolist() == [0, 1, 2, 3, -1]
    assert packed.fill == 0.8 and batch.example.references is None and batch.example.policy is None


def test_padding_attends_only_to_padding():
    records = [short_record([9, 1, 2], 1), short_record([9, 1], 1)]
    packed = pack([((0,),), ((1,),)], records, BatchShape(8, 4, 4, 1, 2), rows_multiple=3)
    visible = attention_mask(packed.batch.intervals)
    real = np.zeros((3, 8), bool)
    real[0, :5] = True
    assert not np.any(visible & (real[:, :, None] != real[:, None, :]))
    assert np.all(visible.any(-1)), "every query needs a key for its softmax"


def test_equal_tokens_are_shared_across_action_masks():
    # The second token is an action in the first record and context in the second.
    first = Record(tokens=[3, 4, 5], action_mask=[0, 1, 1], rewards=[1, 2], group="g")
    second = Record(tokens=[3, 4, 5], action_mask=[0, 0, 1], rewards=[3], group="g")
    packed = pack([((0,), (1,), (0,))], [first, second], BatchShape(4, 3, 3, 1, 2))
    assert packed.batch.tokens.tolist() == [[3, 4, 5, 0]]
    assert packed.batch.gather[0, :, 0].tolist() == [[0, 1], [1, -1], [0, 1]]
    assert packed.batch.targets.tolist() == [[4, 5, 0]] and packed.batch.predictors.tolist() == [[0, 1, 0]]


def test_batch_is_a_pytree_of_arrays():
    packed = pack(
        [((0,),)],
        [short_record([1, 2], 1)],
        BatchShape(2, 1, 1, 1, 1),
        references={"reference": [(np.zeros(1), np.zeros(1))]},
    )
    leaves = jax.tree.leaves(packed.batch)
    assert len(leaves) == 12 and {leaf.dtype.name for leaf in leaves} == {"int32", "float32", "bool"}
    assert {leaf.shape[0] for leaf in leaves} == {1}


def test_packing_is_deterministic(make_groups, make_buffer):
    buffer = make_buffer(make_groups(np.random.default_rng(0), groups=12))
    groups = pack_groups(buffer, "trajectory")
    shape = plan(buffer, groups)
    first, second = (pack(groups, buffer, shape) for _ in range(2))
    chex.assert_trees_all_equal(first.batch, second.batch)


def test_shared_prompt_is_stored_once(make_buffer):
    rng = np.random.default_rng(1)
    records = []
    for group in range(8):
        prompt = rng.integers(100, size=60).tolist()
        records += [short_record([*prompt, *rng.integers(100, size=10)], 10, f"g{group}") for _ in range(8)]
    buffer = make_buffer(records)
    tokens = {}
    for share_prompts in (True, False):
        groups = pack_groups(buffer, "trajectory", share_prompts=share_prompts)
        packed = pack(groups, buffer, plan(buffer, groups, row_length=192))
        tokens[share_prompts] = packed.fill * packed.batch.tokens.size
    assert tokens[False] == 64 * 70
    assert tokens[True] <= 8 * (60 + 80)


@given(rows=st.integers(1, 5000), multiple=st.integers(1, 16))
def test_row_count_bounds(rows, multiple):
    count = row_count(rows, multiple)
    assert count % multiple == 0 and count >= rows
    assert count < rows * 1.125 + multiple
    assert row_count(count, multiple) == count


def test_row_count_has_eight_values_per_power_of_two():
    assert len({row_count(rows) for rows in range(64, 128)}) <= 9
    assert [row_count(rows) for rows in (1, 7, 8, 15, 16, 17, 33)] == [1, 7, 8, 15, 16, 18, 36]


def test_oversized_pack_groups_are_rejected(make_buffer):
    records = [short_record([1, 2, 3, 4, 5, 6], 2), short_record([1, 2, 3, 7, 8], 2), short_record([1, 9], 1, "h")]
    buffer = make_buffer(records)
    groups = pack_groups(buffer, "trajectory")
    with pytest.raises(
        UserError, match=r"2 sequences has 8 tokens, but a row holds 7 \(its longest sequence, record 0, has 6\)"
    ):
        plan(buffer, groups, row_length=7)
    shape = plan(buffer, pack_groups(buffer, "trajectory", row_length=7), row_length=7)
    with pytest.raises(UserError, match="a row holds 7"):
        pack(groups, buffer, shape)
    full = plan(buffer, groups)
    for name, least in (("actions", 4), ("slots", 2), ("sequences", 1), ("steps", 2)):
        with pytest.raises(
            UserError, match=rf"record 0 needs {name}={least}, but the batch shape has {name}={least - 1}"
        ):
            pack(groups, buffer, full._replace(**{name: least - 1}))


def test_statistics_of_the_wrong_length_are_rejected():
    with pytest.raises(ValueError, match="'reference' has 1 logp and 1 lse values for a record with 2 actions"):
        pack(
            [((0,),)],
            [short_record([1, 2, 3], 2)],
            BatchShape(4, 2, 1, 1, 2),
            references={"reference": {0: (np.zeros(1), np.zeros(1))}},
        )


def test_references_are_filled_by_name():
    records = [short_record([9, 1, 2, 3], 2, reward=0.5), short_record([9, 4], 1, reward=2.0)]
    first, previous = make_statistics(records), [(logp - 7, lse + 3) for logp, lse in make_statistics(records)]
    groups, shape = [((0,), (1,))], BatchShape(8, 4, 2, 1, 2)
    batch = pack(groups, records, shape, references={"reference": first, "previous": previous}).batch
    single = pack(groups, records, shape, references={"reference": first}).batch
    for number in range(2):
        count = len(records[number].rewards)
        for name, expected in (("reference", first), ("previous", previous)):
            statistics = batch.example.references[name]
            np.testing.assert_array_equal(statistics.logp[0, number, 0, :count], expected[number][0])
            np.testing.assert_array_equal(statistics.lse[0, number, 0, :count], expected[number][1])
            assert not statistics.logp[0, number, 0, count:].any() and not statistics.lse[0, number, 0, count:].any()
    # The second reference must not change anything else.
    references = {"reference": batch.example.references["reference"]}
    chex.assert_trees_all_equal(batch._replace(example=batch.example._replace(references=references)), single)


def test_empty_batch_is_rejected():
    with pytest.raises(ValueError, match="the batch is empty"):
        pack([], [], BatchShape(1, 1, 1, 1, 1))
