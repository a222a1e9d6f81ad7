"""Choice of one batch shape for a run, which bounds compilations and padding."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int64

from shiq_jax.errors import UserError
from shiq_jax.replay.packing import BatchShape, first_fit, round_up, row_count
from shiq_jax.replay.schedule import PackGroup, Schedule
from shiq_jax.replay.trees import Records, Trees, check_length

# Attention is more expensive in longer rows, so a longer row must save more than this fraction of the token positions.
MIN_SAVING = 0.05
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
    """Choose a batch shape that fits every batch of these pack groups; reads each record once.

    The number of actions and slots per row includes a margin above the average.

    Args:
        records: the buffer, another container indexed by record number, or a `Trees`; see `pack`.
        pack_groups: all pack groups of the run.
        row_length: tokens per row; None chooses it.
        multiple: a chosen row length is a multiple of this.
        batch_size: pack groups per batch. If set, and `row_length` is not, row lengths from the longest pack group to
            twice as much are simulated on a few batches, and longer rows are taken if they reduce padding. If None, the
            row length is that of the longest pack group.
        rows_multiple: the argument of `pack`, used in the simulation.

    Raises:
        UserError: there are no pack groups, or one is longer than `row_length`.
    """
    if not pack_groups:
        raise UserError("the data contain no example; add records, or, for pairs, groups with different rewards.")
    trees, demands = Trees.wrap(records), np.zeros((len(pack_groups), 3), np.int64)
    steps = 0
    for number, pack_group in enumerate(pack_groups):
        tree = trees[pack_group]
        demands[number] = tree.demand
        steps = max(steps, *(len(ranks) for ranks in tree.ranks))
        if row_length is not None:
            check_length(tree, row_length)
    sequences = max(len(example) for pack_group in pack_groups for example in pack_group)

    def shape(length: int) -> BatchShape:
        largest, (tokens, actions, slots) = demands.max(0), demands.sum(0)
        # A margin of 10% above the mean for actions and 25% for slots rarely leaves a row half empty.
        row_actions = max(int(largest[1]), min(length, int(1.1 * length * actions / tokens)))
        row_slots = max(int(largest[2]), min(int(slots), int(1.25 * length * slots / tokens) + 1))
        return BatchShape(length, round_up(row_actions, 8), row_slots, sequences, round_up(steps, 8))

    if row_length is not None:
        return shape(row_length)
    shortest = round_up(int(demands[:, 0].max()), multiple)
    if batch_size is None:
        return shape(shortest)
    stride = round_up(-(-shortest // _TRIAL_LENGTHS), multiple)
    trials = [shape(length) for length in range(shortest, 2 * shortest + 1, stride)]
    sizes = np.array([_batch_tokens(demands, trial, batch_size, rows_multiple) for trial in trials])
    return trials[int(np.argmax(sizes * (1 - MIN_SAVING) <= sizes.min()))]


def _batch_tokens(
    demands: Int64[np.ndarray, "pack_groups 3"], shape: BatchShape, batch_size: int, rows_multiple: int
) -> int:
    """Token positions in the first few batches, including padding."""
    schedule = Schedule(len(demands), batch_size, seed=0)
    rows = 0
    for step in range(min(_TRIAL_BATCHES, schedule.steps())):
        batch = [tuple(demands[index].tolist()) for index in schedule.indices(step)]
        rows += row_count(len(first_fit(batch, shape)), rows_multiple)
    return rows * shape.length
