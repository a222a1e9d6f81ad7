import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shiq_jax.errors import UserError
from shiq_jax.replay import BatchShape, Buffer, Record, Schedule, pack, pack_groups, plan, row_count


def sees(intervals):
    """bool[rows, L, L]: which key (last axis) is visible to which query, by the rule as it is documented."""
    index = np.arange(intervals.shape[1])
    enter, leave = intervals[..., 0], intervals[..., 1]
    return (
        (index <= index[:, None]) & (enter[:, None, :] <= enter[:, :, None]) & (enter[:, :, None] < leave[:, None, :])
    )


def statistics_of(records):
    return [
        (np.arange(len(r.rewards), dtype=np.float32) - 100 * k, np.arange(len(r.rewards)) + 0.5 + k)
        for k, r in enumerate(records)
    ]


def check(packed, records, chosen, shape, statistics):
    """Everything that a batch promises, by looking at each sequence on its own."""
    batch, members = packed.batch, packed.members
    visible = sees(batch.intervals)
    assert np.all(visible[:, np.arange(shape.length), np.arange(shape.length)]), "every token sees itself"
    placed = []
    for row, slot in np.argwhere(batch.real):
        example = tuple(int(number) for number in members[row, slot] if number >= 0)
        placed.append(example)
        for k, number in enumerate(example):
            record, gather = records[number], batch.gather[row, slot, k]
            count = len(record.rewards)
            assert np.all(gather[:count] >= 0) and np.all(gather[count:] == -1)
            assert batch.targets[row, gather[:count]].tolist() == record.tokens[record.action_mask].tolist()
            for action, place in zip(gather[:count], np.flatnonzero(record.action_mask), strict=True):
                context = np.flatnonzero(visible[row, batch.predictors[row, action]])
                assert batch.tokens[row, context].tolist() == record.tokens[:place].tolist()
                assert batch.positions[row, context].tolist() == list(range(place))
            np.testing.assert_array_equal(batch.example.rewards[row, slot, k, :count], record.rewards)
            reference = batch.example.references["reference"]
            np.testing.assert_array_equal(reference.logp[row, slot, k, :count], statistics[number][0])
            np.testing.assert_array_equal(reference.lse[row, slot, k, :count], statistics[number][1])
    assert sorted(placed) == sorted(example for pack_group in chosen for example in pack_group)
    np.testing.assert_array_equal(batch.example.action_mask, batch.gather >= 0)
    absent = batch.gather < 0
    for values in (
        batch.example.rewards,
        batch.example.references["reference"].logp,
        batch.example.references["reference"].lse,
    ):
        assert np.all(values[absent] == 0)
    assert np.all(members[~batch.real] == -1) and np.all(absent[~batch.real])


GROUPS = st.integers(0, 2**32 - 1)


@settings(max_examples=60, deadline=None)
@given(
    seed=GROUPS,
    unit=st.sampled_from(["trajectory", "pair", "group"]),
    batch_size=st.integers(1, 6),
    multiple=st.integers(1, 3),
)
def test_every_sequence_of_a_batch_is_there_and_sees_only_itself(
    make_groups, tmp_path_factory, seed, unit, batch_size, multiple
):
    rng = np.random.default_rng(seed)
    records = make_groups(rng)
    buffer = Buffer.create(tmp_path_factory.mktemp("packing") / "buffer")
    buffer.append(records)
    everything = pack_groups(buffer, unit)
    if not everything:
        assert everything.left_out == len(set(buffer.group_ids()))
        return
    shape = plan(buffer, everything, multiple=8)
    statistics = statistics_of(records)
    schedule = Schedule(len(everything), batch_size, seed)
    for step in range(3):
        chosen = [everything[number] for number in schedule.indices(step)]
        packed = pack(chosen, buffer, shape, references={"reference": statistics}, rows_multiple=multiple)
        rows = len(packed.batch.tokens)
        assert rows % multiple == 0
        assert packed.batch.tokens.shape == (rows, shape.length) and packed.batch.predictors.shape == (
            rows,
            shape.actions,
        )
        assert packed.batch.gather.shape == (rows, shape.slots, shape.sequences, shape.steps)
        check(packed, records, chosen, shape, statistics)


def record(tokens, actions, group="g", reward=0.0):
    mask = np.arange(len(tokens)) >= len(tokens) - actions
    return Record(tokens=tokens, action_mask=mask, rewards=[reward] * actions, group=group)


def test_a_row_worked_by_hand():
    records = [record([9, 1, 2, 3], 2), record([9, 1, 4], 1), record([9, 1, 2, 5], 2), record([7, 8], 1, "h")]
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
    # Distinct actions: 2 (of two sequences), 3, 5, 4, 8.
    assert batch.predictors.tolist() == [[1, 2, 2, 1, 6, 0]] and batch.targets.tolist() == [[2, 3, 5, 4, 8, 0]]
    assert batch.gather[0, :, 0].tolist() == [[0, 1, -1], [3, -1, -1], [0, 2, -1], [4, -1, -1], [-1, -1, -1]]
    assert batch.real.tolist() == [[True, True, True, True, False]]
    assert packed.members[0, :, 0].tolist() == [0, 1, 2, 3, -1]
    assert packed.fill == 0.8 and batch.example.references is None and batch.example.policy is None


def test_padding_sees_only_padding_and_is_seen_by_nobody():
    records = [record([9, 1, 2], 1), record([9, 1], 1)]
    packed = pack([((0,),), ((1,),)], records, BatchShape(8, 4, 4, 1, 2), rows_multiple=3)
    visible = sees(packed.batch.intervals)
    real = np.zeros((3, 8), bool)
    real[0, :5] = True
    assert not np.any(visible & (real[:, :, None] != real[:, None, :]))
    assert np.all(visible.any(-1)), "a query without a key would have no softmax"


def test_equal_sequences_and_mixed_masks_share_their_tokens():
    # The same tokens, once with the second an action, once given by the environment.
    first = Record(tokens=[3, 4, 5], action_mask=[0, 1, 1], rewards=[1, 2], group="g")
    second = Record(tokens=[3, 4, 5], action_mask=[0, 0, 1], rewards=[3], group="g")
    packed = pack([((0,), (1,), (0,))], [first, second], BatchShape(4, 3, 3, 1, 2))
    assert packed.batch.tokens.tolist() == [[3, 4, 5, 0]]
    assert packed.batch.gather[0, :, 0].tolist() == [[0, 1], [1, -1], [0, 1]]
    assert packed.batch.targets.tolist() == [[4, 5, 0]] and packed.batch.predictors.tolist() == [[0, 1, 0]]


def test_batches_are_pytrees_of_arrays():
    packed = pack(
        [((0,),)],
        [record([1, 2], 1)],
        BatchShape(2, 1, 1, 1, 1),
        references={"reference": [(np.zeros(1), np.zeros(1))]},
    )
    leaves = jax.tree.leaves(packed.batch)
    assert len(leaves) == 12 and {leaf.dtype.name for leaf in leaves} == {"int32", "float32", "bool"}
    assert {leaf.shape[0] for leaf in leaves} == {1}


def test_packing_is_deterministic(make_groups, make_buffer):
    buffer = make_buffer(make_groups(np.random.default_rng(0), groups=12))
    everything = pack_groups(buffer, "trajectory")
    shape = plan(buffer, everything)
    first, second = (pack(everything, buffer, shape) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first.batch, second.batch)


def test_a_shared_prompt_is_stored_once(make_buffer):
    rng = np.random.default_rng(1)
    records = []
    for group in range(8):
        prompt = rng.integers(100, size=60).tolist()
        records += [record([*prompt, *rng.integers(100, size=10)], 10, f"g{group}") for _ in range(8)]
    buffer = make_buffer(records)
    shared, alone = pack_groups(buffer, "trajectory"), pack_groups(buffer, "trajectory", share_prompts=False)
    places = {}
    for name, chosen in (("shared", shared), ("alone", alone)):
        packed = pack(chosen, buffer, plan(buffer, chosen, row_length=192))
        places[name] = packed.fill * packed.batch.tokens.size
    assert places["alone"] == 64 * 70
    assert places["shared"] <= 8 * (60 + 80)


@given(rows=st.integers(1, 5000), multiple=st.integers(1, 16))
def test_row_counts_are_few_and_close(rows, multiple):
    count = row_count(rows, multiple)
    assert count % multiple == 0 and count >= rows
    assert count < rows * 1.125 + multiple
    assert row_count(count, multiple) == count


def test_row_counts_take_eight_values_per_octave():
    assert len({row_count(rows) for rows in range(64, 128)}) <= 9
    assert [row_count(rows) for rows in (1, 7, 8, 15, 16, 17, 33)] == [1, 7, 8, 15, 16, 18, 36]


def test_bundles_that_do_not_fit_are_refused_by_record(make_buffer):
    records = [record([1, 2, 3, 4, 5, 6], 2), record([1, 2, 3, 7, 8], 2), record([1, 9], 1, "h")]
    buffer = make_buffer(records)
    everything = pack_groups(buffer, "trajectory")
    with pytest.raises(
        UserError, match=r"2 sequences takes 8 tokens and a row holds 7 \(its longest, record 0, has 6\)"
    ):
        plan(buffer, everything, row_length=7)
    shape = plan(buffer, pack_groups(buffer, "trajectory", row_length=7), row_length=7)
    with pytest.raises(UserError, match="a row holds 7"):
        pack(everything, buffer, shape)
    full = plan(buffer, everything)
    for name, least in (("actions", 4), ("slots", 2), ("sequences", 1), ("steps", 2)):
        with pytest.raises(UserError, match=rf"record 0 needs {name}={least} and the shape has {name}={least - 1}"):
            pack(everything, buffer, full._replace(**{name: least - 1}))


def test_statistics_of_another_record_are_refused():
    with pytest.raises(ValueError, match="statistics of 1 and 1 actions came with a record of 2"):
        pack(
            [((0,),)],
            [record([1, 2, 3], 2)],
            BatchShape(4, 2, 1, 1, 2),
            references={"reference": {0: (np.zeros(1), np.zeros(1))}},
        )


def test_references_are_filled_by_their_names():
    """Each with its own statistics, which an objective finds under that name."""
    records = [record([9, 1, 2, 3], 2, reward=0.5), record([9, 4], 1, reward=2.0)]
    first, previous = statistics_of(records), [(logp - 7, lse + 3) for logp, lse in statistics_of(records)]
    drawn, shape = [((0,), (1,))], BatchShape(8, 4, 2, 1, 2)
    batch = pack(drawn, records, shape, references={"reference": first, "previous": previous}).batch
    alone = pack(drawn, records, shape, references={"reference": first}).batch
    for number in range(2):
        count = len(records[number].rewards)
        for name, known in (("reference", first), ("previous", previous)):
            found = batch.example.references[name]
            np.testing.assert_array_equal(found.logp[0, number, 0, :count], known[number][0])
            np.testing.assert_array_equal(found.lse[0, number, 0, :count], known[number][1])
            assert not found.logp[0, number, 0, count:].any() and not found.lse[0, number, 0, count:].any()
    # A second reference leaves everything else unchanged.
    references = {"reference": batch.example.references["reference"]}
    same = batch._replace(example=batch.example._replace(references=references))
    assert jax.tree.structure(same) == jax.tree.structure(alone)
    jax.tree.map(np.testing.assert_array_equal, same, alone)


def test_nothing_to_pack_is_refused():
    with pytest.raises(ValueError, match="holds no pack_group"):
        pack([], [], BatchShape(1, 1, 1, 1, 1))
