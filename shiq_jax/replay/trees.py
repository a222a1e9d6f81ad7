"""The tries of pack_groups, each built once where there is room to keep it."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from shiq_jax.errors import UserError
from shiq_jax.replay.buffer import Buffer
from shiq_jax.replay.records import Record
from shiq_jax.replay.schedule import PackGroup
from shiq_jax.replay.trie import Trie, build

# Bytes of trees that are kept: some ten million tokens.
ROOM = 1 << 29
# What Python takes for the objects of a record, beside its arrays.
_BYTES_PER_RECORD = 2000


class Tree(NamedTuple):
    """A pack_group with the trie of its sequences."""

    pack_group: PackGroup
    records: list[Record]  # of every sequence of the pack_group, in order
    trie: Trie
    actions: np.ndarray  # indices into the trie of its distinct actions
    ranks: list[np.ndarray]  # for every sequence, its actions as indices into `actions`

    @property
    def demand(self) -> tuple[int, int, int]:
        """The tokens, distinct actions and slots that it takes of a row."""
        return len(self.trie.tokens), len(self.actions), len(self.pack_group)


# Whatever gives the Record of a number by `records[number]`.
Records = Buffer | Mapping[int, Record] | Sequence[Record]


class Trees:
    """Trees of pack_groups by pack_group, `trees[pack_group]`, kept until `room` bytes are taken and made anew beyond.

    Planning and every pass over the data read the same trees. Passes visit each pack_group once in changing order, so
    keeping the first ones serves as often as any other choice.

    Args:
        records: whatever gives the Record of a record number by `records[number]`, such as a buffer.
        room: bytes; 0 keeps none.
    """

    def __init__(self, records: Records, room: int = ROOM):
        self.records, self._room, self._kept = records, room, {}

    @classmethod
    def of(cls, records: "Records | Trees") -> "Trees":
        """The trees themselves, or those of some records, none of which are kept."""
        return records if isinstance(records, Trees) else cls(records, room=0)

    def __getitem__(self, pack_group: PackGroup) -> Tree:
        tree = self._kept.get(pack_group)
        if tree is None:
            tree = make_tree(pack_group, self.records)
            size = _bytes(tree)
            if size <= self._room:
                self._room -= size
                self._kept[pack_group] = tree
        return tree


def make_tree(pack_group: PackGroup, records: Records) -> Tree:
    """The tree of a pack_group, of the Records of its numbers."""
    members = [records[number] for example in pack_group for number in example]
    trie = build([record.tokens for record in members])
    acting = np.zeros(len(trie.tokens), np.bool_)
    for record, path in zip(members, trie.paths, strict=True):
        acting[path[record.action_mask]] = True
    rank = np.cumsum(acting, dtype=np.int32) - 1
    ranks = [rank[path[record.action_mask]] for record, path in zip(members, trie.paths, strict=True)]
    return Tree(pack_group, members, trie, np.flatnonzero(acting), ranks)


def check_length(tree: Tree, length: int) -> None:
    """Raises UserError naming a record of the tree when it is longer than a row."""
    size = len(tree.trie.tokens)
    if size > length:
        numbers = [number for example in tree.pack_group for number in example]
        longest = int(np.argmax([len(path) for path in tree.trie.paths]))
        raise UserError(
            f"a pack_group of {len(numbers)} sequences takes {size} tokens and a row holds {length} (its longest, record "
            f"{numbers[longest]}, has {len(tree.trie.paths[longest])}); raise the row length, or split or shorten "
            "the sequences."
        )


def _bytes(tree: Tree) -> int:
    arrays = [*tree.trie[:5], *tree.trie.paths, tree.actions, *tree.ranks]
    for record in tree.records:
        # Tokens and statistics of a buffer's records lie in its files.
        arrays += [record.action_mask, record.rewards]
    texts = sum(len(record.group) + len(record.prompt or "") for record in tree.records)
    return sum(array.nbytes for array in arrays) + texts + _BYTES_PER_RECORD * len(tree.records)
