"""Packing of examples into rows of equal length; shared prefixes and shared actions are stored once.

The sequences of a pack group form a `Trie`, and a packed row is a forest of tries. Key `k` is visible to query `q` iff
`k <= q` and `enter[k] <= enter[q] < exit[k]`. Pack groups in a row have disjoint intervals, and padding attends only to
padding.
"""

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int, Int32

from shiq_jax.errors import UserError
from shiq_jax.objectives.types import Example, TokenStats
from shiq_jax.replay.records import Record
from shiq_jax.replay.schedule import PackGroup
from shiq_jax.replay.stored_statistics import StoredStatistics
from shiq_jax.replay.trees import Records, Tree, Trees, check_length


class Batch(NamedTuple):
    """Input of an update step; `pack` returns numpy arrays.

    The hidden states at `predictors` predict `targets`. Indexing their token statistics [rows, A] with `gather` gives
    the policy's TokenStats [rows, slots, K, T].

    Attributes:
        tokens: int32[rows, L].
        positions: int32[rows, L], the position of each token in its sequence.
        intervals: int32[rows, L, 2], (enter, exit) of each token.
        predictors: int32[rows, A], row index of the token before each distinct action; 0 at padding.
        targets: int32[rows, A], token id of each distinct action; 0 at padding.
        gather: int32[rows, slots, K, T], index into the A axis for each action of each sequence; -1 at padding.
        example: leading axes [rows, slots]. action_mask is `gather >= 0`. rewards is float32[rows, slots, K, T] and
            references maps names to TokenStats of that shape (None if there are none), with 0 at padding. labels is
            bool[rows, slots, K]: the label of each record, or whether its return is positive if it has none.
        real: bool[rows, slots], False at padding slots.
    """

    tokens: Int32[np.ndarray, "rows L"]
    positions: Int32[np.ndarray, "rows L"]
    intervals: Int32[np.ndarray, "rows L 2"]
    predictors: Int32[np.ndarray, "rows A"]
    targets: Int32[np.ndarray, "rows A"]
    gather: Int32[np.ndarray, "rows slots K T"]
    example: Example
    real: Bool[np.ndarray, "rows slots"]


class BatchShape(NamedTuple):
    """Sizes shared by all batches of a run, so that few programs are compiled."""

    length: int  # L, tokens per row
    actions: int  # A, distinct actions per row
    slots: int  # examples per row
    sequences: int  # K, sequences per example
    steps: int  # T, actions per sequence


class Packed(NamedTuple):
    """A batch and the records in it.

    Attributes:
        batch: see `Batch`.
        members: int[rows, slots, K], the record number of each sequence; -1 at padding.
        fill: fraction of the token positions that are not padding.
    """

    batch: Batch
    members: Int32[np.ndarray, "rows slots K"]
    fill: float


Statistic = tuple[Float32[np.ndarray, " A"], Float32[np.ndarray, " A"]]
# (logp, lse) of a record by its number.
RecordStatistics = StoredStatistics | Mapping[int, Statistic] | Sequence[Statistic]
References = Mapping[str, RecordStatistics]
NO_REFERENCES: References = MappingProxyType({})


def pack(
    batch: Sequence[PackGroup],
    records: Records | Trees,
    shape: BatchShape,
    *,
    references: References = NO_REFERENCES,
    rows_multiple: int = 1,
) -> Packed:
    """Pack pack groups into rows by first-fit decreasing.

    Args:
        batch: the pack groups of one step.
        records: the buffer, or another container indexed by record number; or a `Trees`, which reuses tries across
            batches.
        shape: from `plan`.
        references: maps each name in `Example.references` to a container of (logp, lse) float32[A], indexed by record
            number.
        rows_multiple: the number of rows is padded to a multiple of this, and to few distinct values (`row_count`).

    Raises:
        UserError: a pack group exceeds `shape`.
    """
    if not batch:
        raise ValueError("the batch is empty; give at least one pack group.")
    tree_cache = Trees.wrap(records)
    trees = [tree_cache[pack_group] for pack_group in batch]
    for tree in trees:
        _check_shape(tree, shape)
    layout = first_fit([tree.demand for tree in trees], shape)
    rows = row_count(len(layout), rows_multiple)
    out = _empty_batch(rows, shape, references)
    for row, indices in enumerate(layout):
        _fill_row(out, row, [trees[index] for index in indices], references)
    tokens = sum(len(tree.trie.tokens) for tree in trees)
    return Packed(out.batch, out.members, tokens / (rows * shape.length))


def full_rows(tokens: Int[np.ndarray, "rows length"]) -> Batch:
    """A batch with one sequence of full length per row, in which every token except the first is an action."""
    rows, length = tokens.shape
    positions = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    gather = positions[:, None, None, :-1]
    return Batch(
        tokens=tokens.astype(np.int32), positions=positions, predictors=positions[:, :-1],
        # One sequence per row: the interval [0, 1) makes attention causal.
        intervals=np.stack([np.zeros_like(positions), np.ones_like(positions)], axis=-1),
        targets=tokens[:, 1:].astype(np.int32), gather=gather, real=np.ones((rows, 1), bool),
        example=Example(action_mask=np.ones(gather.shape, bool), rewards=np.zeros(gather.shape, np.float32)),
    )  # fmt: skip


def row_count(rows: int, multiple: int = 1) -> int:
    """Round `rows` up to a multiple, and to one of eight sizes per power of two, which adds at most an eighth."""
    units = -(-rows // multiple)
    step = 1 << max(units.bit_length() - 4, 0)
    return round_up(units, step) * multiple


def _check_shape(tree: Tree, shape: BatchShape) -> None:
    check_length(tree, shape.length)
    sizes = {
        "actions": len(tree.actions),
        "slots": len(tree.pack_group),
        "sequences": max(map(len, tree.pack_group)),
        "steps": max(map(len, tree.ranks)),
    }
    for name, size in sizes.items():
        if size > getattr(shape, name):
            raise UserError(
                f"the pack group of record {tree.pack_group[0][0]} needs {name}={size}, but the batch shape has "
                f"{name}={getattr(shape, name)}; call plan() with all pack groups in use."
            )


def first_fit(demands: Sequence[tuple[int, int, int]], shape: BatchShape) -> list[list[int]]:
    """First-fit decreasing by tokens: the indices of the items in each row.

    Args:
        demands: (tokens, distinct actions, slots) of each item.
        shape: capacity of a row.
    """
    rows: list[list[int]] = []
    free = np.zeros((len(demands), 3), np.int64)
    for index in sorted(range(len(demands)), key=lambda index: -demands[index][0]):
        fits = (free[: len(rows)] >= demands[index]).all(1)
        row = int(np.argmax(fits)) if fits.any() else len(rows)
        if row == len(rows):
            free[row] = shape.length, shape.actions, shape.slots
            rows.append([])
        rows[row].append(index)
        free[row] -= demands[index]
    return rows


def _empty_batch(rows: int, shape: BatchShape, names: Iterable[str]) -> Packed:
    def zeros(*axes: int, dtype=np.int32) -> np.ndarray:
        return np.zeros((rows, *axes), dtype)

    action_axes = (shape.slots, shape.sequences, shape.steps)
    references = {name: TokenStats(*(zeros(*action_axes, dtype=np.float32) for _ in range(2))) for name in names}
    intervals = zeros(shape.length, 2)
    intervals[..., 1] = 1
    batch = Batch(
        tokens=zeros(shape.length),
        positions=zeros(shape.length),
        intervals=intervals,
        predictors=zeros(shape.actions),
        targets=zeros(shape.actions),
        gather=np.full((rows, *action_axes), -1, np.int32),
        example=Example(
            action_mask=zeros(*action_axes, dtype=np.bool_),
            rewards=zeros(*action_axes, dtype=np.float32),
            references=references or None,
            labels=zeros(*action_axes[:2], dtype=np.bool_),
        ),
        real=zeros(shape.slots, dtype=np.bool_),
    )
    return Packed(batch, np.full((rows, shape.slots, shape.sequences), -1, np.int32), 0.0)


def _fill_row(out: Packed, row: int, trees: Sequence[Tree], references: References) -> None:
    """Write trees into a row one after another, offsetting token indices, action indices and sequence numbers."""
    batch = out.batch
    token = action = slot = number = 0
    for tree in trees:
        trie, size, num_actions = tree.trie, len(tree.trie.tokens), len(tree.actions)
        batch.tokens[row, token : token + size] = trie.tokens
        batch.positions[row, token : token + size] = trie.depth
        batch.intervals[row, token : token + size, 0] = trie.enter + number
        batch.intervals[row, token : token + size, 1] = trie.exit + number
        batch.predictors[row, action : action + num_actions] = trie.parent[tree.actions] + token
        batch.targets[row, action : action + num_actions] = trie.tokens[tree.actions]
        sequences = zip(tree.records, tree.ranks, strict=True)
        for example in tree.pack_group:
            batch.real[row, slot] = True
            for k, member in enumerate(example):
                out.members[row, slot, k] = member
                statistics = {name: reference[member] for name, reference in references.items()}
                record, ranks = next(sequences)
                _fill_sequence(batch, (row, slot, k), ranks + action, record, statistics)
            slot += 1
        token, action, number = token + size, action + num_actions, number + len(tree.ranks)
    batch.intervals[row, token:] = (number, number + 1)


def _fill_sequence(
    batch: Batch,
    index: tuple[int, int, int],
    actions: np.ndarray,
    record: Record,
    statistics: Mapping[str, Statistic],
) -> None:
    count = len(actions)
    batch.gather[index][:count] = actions
    batch.example.action_mask[index][:count] = True
    batch.example.rewards[index][:count] = record.rewards
    label = record.label
    batch.example.labels[index] = record.rewards.sum(dtype=np.float64) > 0 if label is None else label
    for name, (logp, lse) in statistics.items():
        if len(logp) != count or len(lse) != count:
            raise ValueError(
                f"reference {name!r} has {len(logp)} logp and {len(lse)} lse values for a record with {count} actions; "
                "index its statistics by the same record numbers."
            )
        stats = batch.example.references[name]
        stats.logp[index][:count], stats.lse[index][:count] = logp, lse


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `value`."""
    return -(-value // multiple) * multiple
