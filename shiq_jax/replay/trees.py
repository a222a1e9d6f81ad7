"""Tries of pack groups, cached across batches and epochs."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from shiq_jax.errors import UserError
from shiq_jax.replay.buffer import Buffer
from shiq_jax.replay.records import Record
from shiq_jax.replay.schedule import PackGroup
from shiq_jax.replay.trie import Trie, build_trie

# Default size of the cache: about ten million tokens.
CACHE_BYTES = 1 << 29
# Python object overhead of a record.
_BYTES_PER_RECORD = 2000


class Tree(NamedTuple):
    """A pack group with the trie of its sequences.

    Attributes:
        pack_group: the record numbers.
        records: the record of each sequence.
        trie: the trie of all sequences.
        actions: int[A], trie indices of the distinct actions.
        ranks: for each sequence, its actions as indices into `actions`.
    """

    pack_group: PackGroup
    records: list[Record]
    trie: Trie
    actions: np.ndarray
    ranks: list[np.ndarray]

    @property
    def demand(self) -> tuple[int, int, int]:
        """Number of tokens, distinct actions and slots that the pack group takes in a row."""
        return len(self.trie.tokens), len(self.actions), len(self.pack_group)


# Any container of Records that is indexed by record number.
Records = Buffer | Mapping[int, Record] | Sequence[Record]


class Trees:
    """Cache of trees: `trees[pack_group]` builds the tree of a pack group, or returns the cached one.

    Trees are cached until `cache_bytes` are used, and rebuilt on every access after that. There is no eviction: each
    epoch visits every pack group once in random order, so no replacement policy would have a better hit rate.

    Args:
        records: the buffer, or another container indexed by record number.
        cache_bytes: size of the cache; 0 disables it.
    """

    def __init__(self, records: Records, cache_bytes: int = CACHE_BYTES):
        self.records, self._free_bytes, self._cache = records, cache_bytes, {}

    @classmethod
    def wrap(cls, records: "Records | Trees") -> "Trees":
        """Return `records` if it is a `Trees`, otherwise a `Trees` without a cache."""
        return records if isinstance(records, Trees) else cls(records, cache_bytes=0)

    def __getitem__(self, pack_group: PackGroup) -> Tree:
        tree = self._cache.get(pack_group)
        if tree is None:
            tree = build_tree(pack_group, self.records)
            size = _bytes(tree)
            if size <= self._free_bytes:
                self._free_bytes -= size
                self._cache[pack_group] = tree
        return tree


def build_tree(pack_group: PackGroup, records: Records) -> Tree:
    """Build the tree of a pack group."""
    members = [records[number] for example in pack_group for number in example]
    trie = build_trie([record.tokens for record in members])
    is_action = np.zeros(len(trie.tokens), np.bool_)
    for record, path in zip(members, trie.paths, strict=True):
        is_action[path[record.action_mask]] = True
    rank = np.cumsum(is_action, dtype=np.int32) - 1
    ranks = [rank[path[record.action_mask]] for record, path in zip(members, trie.paths, strict=True)]
    return Tree(pack_group, members, trie, np.flatnonzero(is_action), ranks)


def check_length(tree: Tree, length: int) -> None:
    """Raise UserError if the tree has more tokens than a row."""
    size = len(tree.trie.tokens)
    if size > length:
        numbers = [number for example in tree.pack_group for number in example]
        longest = int(np.argmax([len(path) for path in tree.trie.paths]))
        raise UserError(
            f"a pack group of {len(numbers)} sequences has {size} tokens, but a row holds {length} (its longest "
            f"sequence, record {numbers[longest]}, has {len(tree.trie.paths[longest])}); increase the row length, or "
            "shorten or split the sequences."
        )


def _bytes(tree: Tree) -> int:
    arrays = [*tree.trie[:5], *tree.trie.paths, tree.actions, *tree.ranks]
    for record in tree.records:
        # Tokens and statistics of buffer records are memory-mapped.
        arrays += [record.action_mask, record.rewards]
    texts = sum(len(record.group) + len(record.prompt or "") for record in tree.records)
    return sum(array.nbytes for array in arrays) + texts + _BYTES_PER_RECORD * len(tree.records)
