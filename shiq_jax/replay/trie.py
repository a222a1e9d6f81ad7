"""Tries of token sequences in depth-first order; tokens of a shared prefix are stored once."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32, Int64


class Trie(NamedTuple):
    """A forest with `n` nodes, one per distinct prefix of the sequences.

    Sequences are numbered in lexicographic order. A node belongs to the sequences `enter <= number < exit`, so node
    `k` is node `q` or an ancestor of it iff `k <= q` and `enter[k] <= enter[q] < exit[k]`.

    Attributes:
        tokens: int32[n], in depth-first order.
        depth: int32[n], position of the token in its sequences.
        parent: int32[n], index of the previous token; -1 at the first token of a sequence.
        enter, exit: int32[n], range of the sequences that contain the node.
        paths: for each input sequence, the int32[length] node indices of its tokens.
    """

    tokens: Int32[np.ndarray, " n"]
    depth: Int32[np.ndarray, " n"]
    parent: Int32[np.ndarray, " n"]
    enter: Int32[np.ndarray, " n"]
    exit: Int32[np.ndarray, " n"]
    paths: list[Int32[np.ndarray, " length"]]


def lexicographic_order(
    sequences: Sequence[Int32[np.ndarray, " length"]],
) -> tuple[list[int], Int64[np.ndarray, " s"]]:
    """Indices that sort the sequences, and the length of the prefix each one shares with its predecessor.

    Tokens must be non-negative.
    """
    # Big-endian bytes of non-negative integers sort in numerical order.
    keys = [np.asarray(sequence).astype(">i4").tobytes() for sequence in sequences]
    order = sorted(range(len(sequences)), key=keys.__getitem__)
    shared = np.zeros(len(order), np.int64)
    for rank in range(1, len(order)):
        previous, current = sequences[order[rank - 1]], sequences[order[rank]]
        common = min(len(previous), len(current))
        differs = previous[:common] != current[:common]
        shared[rank] = np.argmax(differs) if differs.any() else common
    return order, shared


def build_trie(sequences: Sequence[Int32[np.ndarray, " length"]]) -> Trie:
    """Build the trie of the sequences; equal sequences share all their nodes."""
    order, shared = lexicographic_order(sequences)
    total = sum(len(sequences[index]) - int(common) for index, common in zip(order, shared, strict=True))
    tokens, depth, parent, enter, exits = (np.zeros(total, np.int32) for _ in range(5))
    paths: list[np.ndarray] = [np.zeros(0, np.int32)] * len(order)
    path = np.zeros(0, np.int32)
    size = 0
    for number, (index, common) in enumerate(zip(order, shared.tolist(), strict=True)):
        sequence = sequences[index]
        new = np.arange(size, size + len(sequence) - common, dtype=np.int32)
        exits[path[common:]] = number
        path = np.concatenate([path[:common], new])
        tokens[new] = sequence[common:]
        depth[new] = np.arange(common, len(sequence))
        parent[new] = np.concatenate([[-1], path[:-1]])[common:] if len(path) else new
        enter[new] = number
        size += len(new)
        paths[index] = path
    exits[path] = len(order)
    return Trie(tokens, depth, parent, enter, exits, paths)
