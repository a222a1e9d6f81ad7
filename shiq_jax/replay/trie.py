"""Sequences that share beginnings, as one tree in depth-first order: a shared token is stored, and computed, once."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32, Int64


class Trie(NamedTuple):
    """A forest of `n` distinct tokens for `s` sequences.

    Sequences are numbered in lexicographic order. A token belongs to the sequences `enter <= number < exit`, so key
    `k` is an ancestor of query `q`, or `q` itself, exactly when `k <= q` and `enter[k] <= enter[q] < exit[k]`.

    Attributes:
        tokens: int32[n], in depth-first order.
        depth: int32[n], the position of the token in each of its sequences.
        parent: int32[n], the index of the token before it, -1 at the first of a sequence.
        enter, exit: int32[n], the sequences that pass through the token.
        paths: for every given sequence, in the given order, the int32[length] indices of its tokens.
    """

    tokens: Int32[np.ndarray, " n"]
    depth: Int32[np.ndarray, " n"]
    parent: Int32[np.ndarray, " n"]
    enter: Int32[np.ndarray, " n"]
    exit: Int32[np.ndarray, " n"]
    paths: list[Int32[np.ndarray, " length"]]


def lexicographic(sequences: Sequence[Int32[np.ndarray, " length"]]) -> tuple[list[int], Int64[np.ndarray, " s"]]:
    """The order of the sequences, and how many tokens each place of it shares with the place before (0 at the first).

    Tokens must not be negative.
    """
    # Big-endian bytes of non-negative numbers compare as the numbers do, in one memory comparison.
    keys = [np.asarray(sequence).astype(">i4").tobytes() for sequence in sequences]
    order = sorted(range(len(sequences)), key=keys.__getitem__)
    shared = np.zeros(len(order), np.int64)
    for place in range(1, len(order)):
        before, here = sequences[order[place - 1]], sequences[order[place]]
        common = min(len(before), len(here))
        differs = before[:common] != here[:common]
        shared[place] = np.argmax(differs) if differs.any() else common
    return order, shared


def build(sequences: Sequence[Int32[np.ndarray, " length"]]) -> Trie:
    """The trie of the sequences by exact equality of tokens; equal sequences merge."""
    order, shared = lexicographic(sequences)
    total = sum(len(sequences[index]) - int(common) for index, common in zip(order, shared, strict=True))
    tokens, depth, parent, enter, exits = (np.zeros(total, np.int32) for _ in range(5))
    paths: list[np.ndarray] = [np.zeros(0, np.int32)] * len(order)
    path = np.zeros(0, np.int32)
    used = 0
    for number, (index, common) in enumerate(zip(order, shared.tolist(), strict=True)):
        sequence = sequences[index]
        fresh = np.arange(used, used + len(sequence) - common, dtype=np.int32)
        exits[path[common:]] = number
        path = np.concatenate([path[:common], fresh])
        tokens[fresh] = sequence[common:]
        depth[fresh] = np.arange(common, len(sequence))
        parent[fresh] = np.concatenate([[-1], path[:-1]])[common:] if len(path) else fresh
        enter[fresh] = number
        used += len(fresh)
        paths[index] = path
    exits[path] = len(order)
    return Trie(tokens, depth, parent, enter, exits, paths)
