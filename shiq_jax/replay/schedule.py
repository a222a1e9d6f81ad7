"""Pack groups of a buffer, and the batch schedule: a pure function of (seed, step)."""

import math
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from jaxtyping import Int32, Int64

from shiq_jax.replay.buffer import Buffer
from shiq_jax.replay.preference import select_pair
from shiq_jax.replay.trie import lexicographic_order

UNITS = ("trajectory", "pair", "group")

# Record numbers of one example: one for a trajectory, (chosen, rejected) for a pair, all records of a group.
Members = tuple[int, ...]
# Examples that share a prompt and are packed into the same row.
PackGroup = tuple[Members, ...]


class PackGroups(list[PackGroup]):
    """A list of pack groups; `skipped` counts the groups that yield none."""

    def __init__(self, pack_groups: Iterable[PackGroup] = (), skipped: int = 0):
        super().__init__(pack_groups)
        self.skipped = skipped


def pack_groups(
    buffer: Buffer,
    unit: str,
    share_prompts: bool = True,
    *,
    max_examples: int | None = None,
    row_length: int | None = None,
) -> PackGroups:
    """The pack groups of a buffer, in order of first appearance of their groups.

    Args:
        buffer: the records.
        unit: "trajectory": every record is an example, and the records of a group form a pack group. "pair": each group
            gives one (chosen, rejected) example, see `select_pair`; groups without a pair are counted in `skipped`.
            "group": each group is one example.
        share_prompts: False puts every trajectory into its own pack group; pairs and groups always share their prompt.
        max_examples: maximum number of examples per pack group; larger groups of trajectories are split.
        row_length: maximum number of tokens per pack group, where shared tokens count once; larger groups of
            trajectories are split between the sequences with the shortest shared prefix. `plan` rejects single
            sequences, pairs and groups that are still too long.
    """
    if unit not in UNITS:
        raise ValueError(f"unit is {unit!r}; choose one of {', '.join(UNITS)}.")
    if not share_prompts and unit != "trajectory":
        raise ValueError(f"share_prompts=False requires unit 'trajectory', but unit is {unit!r}.")
    for name, value in (("max_examples", max_examples), ("row_length", row_length)):
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; give a positive number.")
    groups = group_members(buffer.group_ids())
    if unit == "group":
        return PackGroups((members,) for members in groups)
    if unit == "pair":
        return _pairs(groups, buffer)
    if not share_prompts:
        return PackGroups(((number,),) for number in range(len(buffer)))

    return PackGroups(trajectory_groups(groups, buffer, buffer.lengths(), row_length, max_examples))


def trajectory_groups(
    groups: Iterable[Members], records, lengths: Sequence[int], row_length: int | None, max_size: int | None = None
) -> Iterator[PackGroup]:
    """Yield the pack groups of trajectories; groups that exceed `row_length` or `max_size` are split.

    Args:
        groups: record numbers of each group.
        records: Records, indexed by record number; read only for groups that may exceed a row.
        lengths: number of tokens of each record.
        row_length: maximum number of tokens of a pack group, or None.
        max_size: maximum number of sequences of a pack group, or None.
    """
    for members in groups:
        limit = max_size or len(members)
        if row_length is None:
            parts = [range(start, min(start + limit, len(members))) for start in range(0, len(members), limit)]
        elif len(members) <= limit and sum(int(lengths[number]) for number in members) <= row_length:
            # The group fits even without shared tokens, so its records need not be read.
            parts = [range(len(members))]
        else:
            parts = split_group([records[number].tokens for number in members], row_length, limit)
        yield from (tuple((members[index],) for index in part) for part in parts)


class Schedule:
    """Stateless shuffled batches: each epoch visits every item once.

    The order of an epoch depends only on (seed, epoch), so resumed runs and other processes get the same batches. A
    batch may cross the boundary between two epochs.

    Args:
        size: number of items.
        batch_size: items per step.
        seed: 0 <= seed < 2**64.
    """

    def __init__(self, size: int, batch_size: int, seed: int):
        for name, value in (("size", size), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1.")
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed is {seed}; give a number from 0 to 2**64 - 1.")
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self._recent: dict[int, np.ndarray] = {}

    def indices(self, step: int) -> Int64[np.ndarray, " batch_size"]:
        """Indices of the items of a step."""
        if step < 0:
            raise ValueError(f"step is {step}; steps are counted from 0.")
        positions = step * self.batch_size + np.arange(self.batch_size, dtype=np.int64)
        epochs, offsets = np.divmod(positions, self.size)
        items = [self._order(int(epoch))[offset] for epoch, offset in zip(epochs, offsets, strict=True)]
        return np.array(items, np.int64)

    def steps(self, epochs: float = 1) -> int:
        """Number of steps that cover `epochs` epochs, rounded up."""
        # Round before the ceiling, because 0.1 * 30 exceeds 3 in floating point.
        return math.ceil(round(epochs * self.size / self.batch_size, 9))

    def _order(self, epoch: int) -> Int64[np.ndarray, " size"]:
        if epoch not in self._recent:
            # numpy guarantees stable raw bits across versions, but not stable shuffles.
            bits = np.random.Philox(key=np.array([self.seed, epoch], np.uint64)).random_raw(self.size)
            previous = dict(list(self._recent.items())[-1:])
            self._recent = {**previous, epoch: np.argsort(bits, kind="stable")}
        return self._recent[epoch]


def group_members(names: Sequence[str]) -> list[Members]:
    """Record numbers of each group, in order of first appearance.

    Args:
        names: the group name of every record.
    """
    groups: dict[str, list[int]] = {}
    for number, name in enumerate(names):
        groups.setdefault(name, []).append(number)
    return [tuple(members) for members in groups.values()]


def _pairs(groups: list[Members], buffer: Buffer) -> PackGroups:
    columns, returns = [buffer.column(name) for name in ("chosen", "rank", "score")], buffer.returns()
    pairs = []
    for members in groups:
        feedback = ([column[number] for number in members] for column in columns)
        pair = select_pair(*feedback, returns[list(members)])
        if pair is not None:
            pairs.append((tuple(members[index] for index in pair),))
    return PackGroups(pairs, skipped=len(groups) - len(pairs))


def split_group(
    sequences: Sequence[Int32[np.ndarray, " length"]], row_length: int, max_size: int | None = None
) -> list[list[int]]:
    """Split a group of sequences into parts that fit a row; returns the indices of each part.

    Sequences are assigned greedily in lexicographic order. A sequence longer than a row becomes its own part.

    Args:
        sequences: token ids.
        row_length: maximum number of tokens of a part, where shared tokens count once.
        max_size: maximum number of sequences of a part, or None.
    """
    order, shared = lexicographic_order(sequences)
    # In lexicographic order, each sequence adds the tokens after the prefix it shares with its predecessor.
    parts: list[list[int]] = []
    used = 0
    for index, common in zip(order, shared.tolist(), strict=True):
        length = len(sequences[index])
        if not parts or len(parts[-1]) == max_size or used + length - common > row_length:
            parts.append([])
            used, common = 0, 0
        used += length - common
        parts[-1].append(int(index))
    return [sorted(part) for part in parts]
