"""The tries of bundles, each built once where there is room to keep it."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from shiq_jax.errors import Refusal
from shiq_jax.replay.buffer import Buffer
from shiq_jax.replay.records import Record
from shiq_jax.replay.sampling import Bundle
from shiq_jax.replay.trie import Trie, build

# Bytes of trees that are kept: some ten million tokens.
ROOM = 1 << 29
# What Python takes for the objects of a record, beside its arrays.
_BYTES_PER_RECORD = 2000


class Tree(NamedTuple):
    """A bundle with the trie of its sequences."""

    bundle: Bundle
    records: list[Record]  # of every sequence of the bundle, in order
    trie: Trie
    actions: np.ndarray  # indices into the trie of its distinct actions
    ranks: list[np.ndarray]  # for every sequence, its actions as indices into `actions`

    @property
    def demand(self) -> tuple[int, int, int]:
        """The tokens, distinct actions and slots that it takes of a row."""
        return len(self.trie.tokens), len(self.actions), len(self.bundle)


# Whatever gives the Record of a number by `records[number]`.
Records = Buffer | Mapping[int, Record] | Sequence[Record]


class Trees:
    """Trees of bundles by bundle, `trees[bundle]`, kept until `room` bytes are taken and made anew beyond.

    Planning and every pass over the data read the same trees. Passes visit each bundle once in changing order, so
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

    def __getitem__(self, bundle: Bundle) -> Tree:
        tree = self._kept.get(bundle)
        if tree is None:
            tree = make_tree(bundle, self.records)
            size = _bytes(tree)
            if size <= self._room:
                self._room -= size
                self._kept[bundle] = tree
        return tree


def make_tree(bundle: Bundle, records: Records) -> Tree:
    """The tree of a bundle, of the Records of its numbers."""
    members = [records[number] for example in bundle for number in example]
    trie = build([record.tokens for record in members])
    acting = np.zeros(len(trie.tokens), np.bool_)
    for record, path in zip(members, trie.paths, strict=True):
        acting[path[record.action_mask]] = True
    rank = np.cumsum(acting, dtype=np.int32) - 1
    ranks = [rank[path[record.action_mask]] for record, path in zip(members, trie.paths, strict=True)]
    return Tree(bundle, members, trie, np.flatnonzero(acting), ranks)


def check_length(tree: Tree, length: int) -> None:
    """Raises Refusal naming a record of the tree when it is longer than a row."""
    size = len(tree.trie.tokens)
    if size > length:
        numbers = [number for example in tree.bundle for number in example]
        longest = int(np.argmax([len(path) for path in tree.trie.paths]))
        raise Refusal(
            f"a bundle of {len(numbers)} sequences takes {size} tokens and a row holds {length} (its longest, record "
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
