"""PackGroups of examples laid out in rows of equal length, each token once, each distinct action once.

A pack_group becomes a `Trie`, a row a forest of tries. Key `k` of a row is visible to query `q` exactly when `k <= q` and
`enter[k] <= enter[q] < exit[k]`; pack_groups of one row have disjoint intervals, and padding sees only padding.
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
    """What an update step reads; numpy arrays as `pack` makes them.

    The hidden states at `predictors` predict `targets`; the statistics of these distinct actions [rows, A], taken by
    `gather`, are the policy's TokenStats [rows, slots, K, T].

    Attributes:
        tokens: int32[rows, L].
        positions: int32[rows, L], along the path from the beginning of a sequence.
        intervals: int32[rows, L, 2], (enter, exit) of each token.
        predictors: int32[rows, A], row index of the token before each distinct action; 0 at padding.
        targets: int32[rows, A], the token id of that action; 0 at padding.
        gather: int32[rows, slots, K, T], index into the A axis for each action of each sequence; -1 at padding.
        example: leading axes [rows, slots]; action_mask is `gather >= 0`, rewards float32[rows, slots, K, T],
            references name -> TokenStats float32[rows, slots, K, T], None without any; 0 at padding;
            labels bool[rows, slots, K], the records' labels, and without these whether their rewards sum to more
            than 0.
        real: bool[rows, slots], the slots that hold an example.
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
    """Sizes that all batches of a run share, so that few programs are compiled."""

    length: int  # L, tokens per row
    actions: int  # A, distinct actions per row
    slots: int  # examples per row
    sequences: int  # K, sequences per example
    steps: int  # T, actions per sequence


class Packed(NamedTuple):
    """A batch and where it came from.

    Attributes:
        batch: see `Batch`.
        members: int[rows, slots, K], the record number of each sequence; -1 where there is none.
        fill: the share of the row places that hold a token.
    """

    batch: Batch
    members: Int32[np.ndarray, "rows slots K"]
    fill: float


Statistic = tuple[Float32[np.ndarray, " A"], Float32[np.ndarray, " A"]]
# Whatever gives (logp, lse) of a record by its number.
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
    """Lays pack_groups out in as few rows as first-fit, longest first, finds.

    Args:
        batch: the pack_groups of one step.
        records: whatever gives the Record of a record number by `records[number]`, such as the buffer itself; or
            their `Trees`, which are built once for all batches.
        shape: from `plan`; raises UserError when a pack_group exceeds it.
        references: by name, the statistics that fill `Example.references`: whatever gives (logp, lse) float32[A] by
            record number.
        rows_multiple: rows come in a multiple of this, and in few different numbers (`row_count`); padding rows hold
            nothing.
    """
    if not batch:
        raise ValueError("the batch holds no pack_group; give at least one.")
    built = Trees.of(records)
    trees = [built[pack_group] for pack_group in batch]
    for tree in trees:
        _check(tree, shape)
    layout = first_fit([tree.demand for tree in trees], shape)
    rows = row_count(len(layout), rows_multiple)
    out = _blank(rows, shape, references)
    for row, contents in enumerate(layout):
        _fill_row(out, row, [trees[number] for number in contents], references)
    tokens = sum(len(tree.trie.tokens) for tree in trees)
    return Packed(out.batch, out.members, tokens / (rows * shape.length))


def full_rows(tokens: Int[np.ndarray, "rows length"]) -> Batch:
    """A batch of sequences of one length, each a row and an example, of which all tokens but the first are actions."""
    rows, length = tokens.shape
    places = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    gather = places[:, None, None, :-1]
    return Batch(
        tokens=tokens.astype(np.int32), positions=places, predictors=places[:, :-1],
        # Nothing branches off: all later tokens see each token.
        intervals=np.stack([np.zeros_like(places), np.ones_like(places)], axis=-1),
        targets=tokens[:, 1:].astype(np.int32), gather=gather, real=np.ones((rows, 1), bool),
        example=Example(action_mask=np.ones(gather.shape, bool), rewards=np.zeros(gather.shape, np.float32)),
    )  # fmt: skip


def row_count(rows: int, multiple: int = 1) -> int:
    """`rows` rounded up to a multiple, and further to one of eight multiples per octave: at most an eighth more."""
    units = -(-rows // multiple)
    step = 1 << max(units.bit_length() - 4, 0)
    return round_up(units, step) * multiple


def _check(tree: Tree, shape: BatchShape) -> None:
    check_length(tree, shape.length)
    found = {
        "actions": len(tree.actions),
        "slots": len(tree.pack_group),
        "sequences": max(map(len, tree.pack_group)),
        "steps": max(map(len, tree.ranks)),
    }
    for name, size in found.items():
        if size > getattr(shape, name):
            raise UserError(
                f"the pack_group of record {tree.pack_group[0][0]} needs {name}={size} and the shape has "
                f"{name}={getattr(shape, name)}; make the shape with plan() from all the pack_groups in use."
            )


def first_fit(demands: Sequence[tuple[int, int, int]], shape: BatchShape) -> list[list[int]]:
    """For each row the numbers of what lies in it: longest first, each in the first row that has room in all three."""
    rows: list[list[int]] = []
    left = np.zeros((len(demands), 3), np.int64)
    for number in sorted(range(len(demands)), key=lambda number: -demands[number][0]):
        fits = (left[: len(rows)] >= demands[number]).all(1)
        row = int(np.argmax(fits)) if fits.any() else len(rows)
        if row == len(rows):
            left[row] = shape.length, shape.actions, shape.slots
            rows.append([])
        rows[row].append(number)
        left[row] -= demands[number]
    return rows


def _blank(rows: int, shape: BatchShape, names: Iterable[str]) -> Packed:
    def zeros(*axes: int, dtype=np.int32) -> np.ndarray:
        return np.zeros((rows, *axes), dtype)

    dense = (shape.slots, shape.sequences, shape.steps)
    references = {name: TokenStats(*(zeros(*dense, dtype=np.float32) for _ in range(2))) for name in names}
    intervals = zeros(shape.length, 2)
    intervals[..., 1] = 1
    batch = Batch(
        tokens=zeros(shape.length),
        positions=zeros(shape.length),
        intervals=intervals,
        predictors=zeros(shape.actions),
        targets=zeros(shape.actions),
        gather=np.full((rows, *dense), -1, np.int32),
        example=Example(
            action_mask=zeros(*dense, dtype=np.bool_),
            rewards=zeros(*dense, dtype=np.float32),
            references=references or None,
            labels=zeros(*dense[:2], dtype=np.bool_),
        ),
        real=zeros(shape.slots, dtype=np.bool_),
    )
    return Packed(batch, np.full((rows, shape.slots, shape.sequences), -1, np.int32), 0.0)


def _fill_row(out: Packed, row: int, trees: Sequence[Tree], references: References) -> None:
    """Writes the trees one after another, moving token indices, action indices and sequence numbers along."""
    batch = out.batch
    token = action = slot = number = 0
    for tree in trees:
        trie, size, acts = tree.trie, len(tree.trie.tokens), len(tree.actions)
        batch.tokens[row, token : token + size] = trie.tokens
        batch.positions[row, token : token + size] = trie.depth
        batch.intervals[row, token : token + size, 0] = trie.enter + number
        batch.intervals[row, token : token + size, 1] = trie.exit + number
        batch.predictors[row, action : action + acts] = trie.parent[tree.actions] + token
        batch.targets[row, action : action + acts] = trie.tokens[tree.actions]
        sequences = zip(tree.records, tree.ranks, strict=True)
        for example in tree.pack_group:
            batch.real[row, slot] = True
            for k, member in enumerate(example):
                out.members[row, slot, k] = member
                known = {name: statistics[member] for name, statistics in references.items()}
                record, ranks = next(sequences)
                _fill_sequence(batch, (row, slot, k), ranks + action, record, known)
            slot += 1
        token, action, number = token + size, action + acts, number + len(tree.ranks)
    batch.intervals[row, token:] = (number, number + 1)


def _fill_sequence(
    batch: Batch, place: tuple[int, int, int], actions: np.ndarray, record: Record, known: Mapping[str, Statistic]
) -> None:
    count = len(actions)
    batch.gather[place][:count] = actions
    batch.example.action_mask[place][:count] = True
    batch.example.rewards[place][:count] = record.rewards
    label = record.label
    batch.example.labels[place] = record.rewards.sum(dtype=np.float64) > 0 if label is None else label
    for name, (logp, lse) in known.items():
        if len(logp) != count or len(lse) != count:
            raise ValueError(
                f"statistics of {len(logp)} and {len(lse)} actions came with a record of {count}; give the (logp, lse) "
                f"of {name!r} by the same record numbers."
            )
        stats = batch.example.references[name]
        stats.logp[place][:count], stats.lse[place][:count] = logp, lse


def round_up(value: int, multiple: int) -> int:
    """The least multiple that is not less than `value`."""
    return -(-value // multiple) * multiple
