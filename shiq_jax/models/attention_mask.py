"""The interval rule for attention visibility, shared by packed rows and decoding caches."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

NEVER = np.iinfo(np.int32).max  # `key_enter` of a key that no query sees


class AttentionMask(NamedTuple):
    """Visibility of keys to queries, described by indices and intervals instead of a [Q, K] array.

    Key k is visible to query q iff `key_index[k] <= query_index[q]` and `key_enter[k] <= query_enter[q] < key_exit[k]`.
    When each token carries the interval `[enter, exit)` of its node in a depth-first forest, a query sees exactly
    itself and its ancestors.

    Attributes:
        aligned: query i and key i have the same index, so no query sees a key at a larger position.
    """

    query_index: Int[Array, "#rows queries"]
    query_enter: Int[Array, "#rows queries"]
    key_index: Int[Array, "#rows keys"]
    key_enter: Int[Array, "#rows keys"]
    key_exit: Int[Array, "#rows keys"]
    aligned: bool = False


def forest_mask(intervals: Int[Array, "rows length 2"] | None, length: int) -> AttentionMask:
    """The mask of packed rows; plain causal attention over the row when `intervals` is None."""
    index = jnp.arange(length, dtype=jnp.int32)[None]
    if intervals is None:
        zeros = jnp.zeros_like(index)
        return AttentionMask(index, zeros, index, zeros, zeros + 1, aligned=True)
    enter, exit_ = intervals[..., 0], intervals[..., 1]
    return AttentionMask(index, enter, index, enter, exit_, aligned=True)


def cache_mask(
    enter: Int[Array, "rows slots"],
    exit: Int[Array, "rows slots"],
    query_enter: Int[Array, "rows queries"],
    start: Int[Array, ""] | int,
) -> AttentionMask:
    """The mask of queries at cache slots start, start + 1, ..., each over all slots up to its own."""
    slots = jnp.arange(enter.shape[-1], dtype=jnp.int32)[None]
    query_index = jnp.arange(query_enter.shape[-1], dtype=jnp.int32)[None] + start
    return AttentionMask(query_index, query_enter, slots, enter, exit, aligned=isinstance(start, int) and start == 0)


def dense_mask(mask: AttentionMask) -> Bool[Array, "rows queries keys"]:
    """The mask as a boolean array."""
    query_index, query_enter = mask.query_index[..., :, None], mask.query_enter[..., :, None]
    key_index, key_enter, key_exit = (field[..., None, :] for field in mask[2:5])
    return (key_index <= query_index) & (key_enter <= query_enter) & (query_enter < key_exit)
