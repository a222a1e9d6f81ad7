"""What is drawn together from a buffer, and in which order: a pure function of (seed, step)."""

import math
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from jaxtyping import Int32, Int64

from shiq_jax.replay.buffer import Buffer
from shiq_jax.replay.preference import chosen_and_rejected
from shiq_jax.replay.trie import lexicographic

UNITS = ("trajectory", "pair", "group")

# Record numbers of one example: one for a trajectory, (chosen, rejected) for a pair, all of a group.
Members = tuple[int, ...]
# The examples that share one tree of tokens and therefore one row.
PackGroup = tuple[Members, ...]


class PackGroups(list[PackGroup]):
    """A list of pack_groups that also counts the groups that gave none (`left_out`)."""

    def __init__(self, pack_groups: Iterable[PackGroup] = (), left_out: int = 0):
        super().__init__(pack_groups)
        self.left_out = left_out


def pack_groups(
    buffer: Buffer,
    unit: str,
    share_prompts: bool = True,
    *,
    max_pack_group: int | None = None,
    row_length: int | None = None,
) -> PackGroups:
    """The pack_groups of a buffer, in order of first appearance of their groups.

    Args:
        buffer: whose records are bundled.
        unit: "trajectory": every record is an example, and those of one group form a pack_group. "pair": the
            (chosen, rejected) records of each group, see `chosen_and_rejected`; a group without two such records gives
            none and is counted in `left_out`. "group": each group is one example.
        share_prompts: False puts every trajectory into a pack_group of its own. A pair or group always shares its prompt.
        max_pack_group: examples per pack_group at most; larger groups of trajectories are split.
        row_length: tokens per pack_group at most, shared ones counted once; larger groups of trajectories are split
            between the sequences that share least. What cannot be split is left to `plan` to refuse.
    """
    if unit not in UNITS:
        raise ValueError(f"unit is {unit!r}; choose one of {', '.join(UNITS)}.")
    if not share_prompts and unit != "trajectory":
        raise ValueError(
            f"share_prompts=False goes with unit 'trajectory' only, found {unit!r}; one example is always one tree."
        )
    for name, value in (("max_pack_group", max_pack_group), ("row_length", row_length)):
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; give a positive number.")
    groups = group_members(buffer.group_ids())
    if unit == "group":
        return PackGroups((members,) for members in groups)
    if unit == "pair":
        return _pairs(groups, buffer)
    if not share_prompts:
        return PackGroups(((number,),) for number in range(len(buffer)))

    return PackGroups(trajectory_groups(groups, buffer, buffer.lengths(), row_length, max_pack_group))


def trajectory_groups(
    groups: Iterable[Members], records, lengths: Sequence[int], row_length: int | None, most: int | None = None
) -> Iterator[PackGroup]:
    """PackGroups of trajectories: a group's, or several where it exceeds a row or `most` sequences; see `pack_groups`.

    Args:
        groups: record numbers of each group.
        records: gives the Record of a number; asked only for groups that may exceed a row.
        lengths: tokens of each record, by number.
        row_length, most: bounds of a pack_group, or None.
    """
    for members in groups:
        limit = most or len(members)
        if row_length is None:
            parts = [range(at, min(at + limit, len(members))) for at in range(0, len(members), limit)]
        elif len(members) <= limit and sum(int(lengths[number]) for number in members) <= row_length:
            # It fits even if its sequences share nothing, so there is nothing to compare.
            parts = [range(len(members))]
        else:
            parts = split_group([records[number].tokens for number in members], row_length, limit)
        yield from (tuple((members[place],) for place in part) for part in parts)


class Schedule:
    """Which items make up the batch of each step: each epoch visits every item once, in an order of its own.

    The order of an epoch is drawn from (seed, epoch). A batch that reaches the end of an epoch goes on with the next
    one. There is no state: a resumed run, or another process, gets the same order by asking for the same step.

    Args:
        size: how many items there are.
        batch_size: items per step.
        seed: 0 <= seed < 2**64.
    """

    def __init__(self, size: int, batch_size: int, seed: int):
        for name, value in (("size", size), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"{name} is {value}; a schedule needs at least 1.")
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed is {seed}; give a number from 0 to 2**64 - 1.")
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self._recent: dict[int, np.ndarray] = {}

    def indices(self, step: int) -> Int64[np.ndarray, " batch_size"]:
        """The items of this step, counted from 0."""
        if step < 0:
            raise ValueError(f"step is {step}; steps are counted from 0.")
        places = step * self.batch_size + np.arange(self.batch_size, dtype=np.int64)
        epochs, within = np.divmod(places, self.size)
        return np.array([self._order(int(epoch))[at] for epoch, at in zip(epochs, within, strict=True)], np.int64)

    def steps(self, epochs: float = 1) -> int:
        """The fewest steps that visit every item `epochs` times."""
        # Rounded first: 0.1 * 30 is more than 3 in floating point.
        return math.ceil(round(epochs * self.size / self.batch_size, 9))

    def _order(self, epoch: int) -> Int64[np.ndarray, " size"]:
        if epoch not in self._recent:
            # Raw bits of a bit generator never change between numpy versions; shuffles may.
            draws = np.random.Philox(key=np.array([self.seed, epoch], np.uint64)).random_raw(self.size)
            kept = dict(list(self._recent.items())[-1:])
            self._recent = {**kept, epoch: np.argsort(draws, kind="stable")}
        return self._recent[epoch]


def group_members(names: Sequence[str]) -> list[Members]:
    """Record numbers of each group, in order of first appearance; `names` are the groups of all records."""
    groups: dict[str, list[int]] = {}
    for number, name in enumerate(names):
        groups.setdefault(name, []).append(number)
    return [tuple(members) for members in groups.values()]


def _pairs(groups: list[Members], buffer: Buffer) -> PackGroups:
    judged, returns = [buffer.column(name) for name in ("chosen", "rank", "score")], buffer.returns()
    pairs = []
    for members in groups:
        said = ([column[number] for number in members] for column in judged)
        found = chosen_and_rejected(*said, returns[list(members)])
        if found is not None:
            pairs.append((tuple(members[place] for place in found),))
    return PackGroups(pairs, left_out=len(groups) - len(pairs))


def split_group(
    sequences: Sequence[Int32[np.ndarray, " length"]], row_length: int, most: int | None = None
) -> list[list[int]]:
    """Parts of a group of sequences, as places in it: of so many tokens at most, shared ones counted once.

    They are cut between the sequences that share least; one that is longer by itself makes a part of its own.

    Args:
        sequences: token ids.
        row_length: tokens of a part.
        most: sequences of a part, or None.
    """
    order, shared = lexicographic(sequences)
    # In lexicographic order a tree grows by what each sequence does not share with the one before.
    parts: list[list[int]] = []
    used = 0
    for place, common in zip(order, shared.tolist(), strict=True):
        length = len(sequences[place])
        if not parts or len(parts[-1]) == most or used + length - common > row_length:
            parts.append([])
            used, common = 0, 0
        used += length - common
        parts[-1].append(int(place))
    return [sorted(part) for part in parts]
