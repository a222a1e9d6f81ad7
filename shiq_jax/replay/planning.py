"""The sizes of the batches of a run, chosen once so that few programs are compiled and little is padded."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int64

from shiq_jax.errors import UserError
from shiq_jax.replay.packing import BatchShape, first_fit, round_up, row_count
from shiq_jax.replay.schedule import PackGroup, Schedule
from shiq_jax.replay.trees import Records, Trees, check_length

# Longer rows cost more attention; they are taken only when the best length saves more than this part of the places.
WORTH = 0.05
_TRIAL_BATCHES = 8
_TRIAL_LENGTHS = 16


def plan(
    records: Records | Trees,
    pack_groups: Sequence[PackGroup],
    *,
    row_length: int | None = None,
    multiple: int = 64,
    batch_size: int | None = None,
    rows_multiple: int = 1,
) -> BatchShape:
    """Sizes that hold every batch of these pack_groups; reads all their records once.

    Rows have room for somewhat more actions and examples than a full row has on average.

    Args:
        records: whatever gives the Record of a record number by `records[number]`, or their `Trees`; see `pack`.
        pack_groups: all that will be drawn from.
        row_length: tokens per row; raises UserError naming the record when a pack_group is longer.
        multiple: without `row_length`, rows are a multiple of this long.
        batch_size: pack_groups per batch. When it is given and `row_length` is not, lengths up to twice the longest
            pack_group are tried on a few batches, for two pack_groups in a row may leave less empty than one; without it,
            rows are as long as the longest pack_group.
        rows_multiple: as `pack` will be given it; counts in these trials.
    """
    if not pack_groups:
        raise UserError(
            "there is no example to make batches of; add records, or, for pairs, groups whose rewards differ."
        )
    trees, demands = Trees.of(records), np.zeros((len(pack_groups), 3), np.int64)
    steps = 0
    for number, pack_group in enumerate(pack_groups):
        tree = trees[pack_group]
        demands[number] = tree.demand
        steps = max(steps, *(len(ranks) for ranks in tree.ranks))
        if row_length is not None:
            check_length(tree, row_length)
    sequences = max(len(example) for pack_group in pack_groups for example in pack_group)

    def shape(length: int) -> BatchShape:
        most, (tokens, actions, slots) = demands.max(0), demands.sum(0)
        # A tenth (for examples, being fewer, a quarter) above the mean seldom leaves a row half empty, and refuses
        # nothing.
        room = max(int(most[1]), min(length, int(1.1 * length * actions / tokens)))
        examples = max(int(most[2]), min(int(slots), int(1.25 * length * slots / tokens) + 1))
        return BatchShape(length, round_up(room, 8), examples, sequences, round_up(steps, 8))

    if row_length is not None:
        return shape(row_length)
    shortest = round_up(int(demands[:, 0].max()), multiple)
    if batch_size is None:
        return shape(shortest)
    stride = round_up(-(-shortest // _TRIAL_LENGTHS), multiple)
    trials = [shape(length) for length in range(shortest, 2 * shortest + 1, stride)]
    places = np.array([_places(demands, trial, batch_size, rows_multiple) for trial in trials])
    return trials[int(np.argmax(places * (1 - WORTH) <= places.min()))]


def _places(demands: Int64[np.ndarray, "pack_groups 3"], shape: BatchShape, batch_size: int, rows_multiple: int) -> int:
    """Token places, padding included, of the first few batches of a pass."""
    schedule = Schedule(len(demands), batch_size, seed=0)
    rows = 0
    for step in range(min(_TRIAL_BATCHES, schedule.steps())):
        chosen = [tuple(demands[number].tolist()) for number in schedule.indices(step)]
        rows += row_count(len(first_fit(chosen, shape)), rows_multiple)
    return rows * shape.length
