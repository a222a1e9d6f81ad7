"""Who sees whom: the interval rule of packed rows and of caches."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

NEVER = np.iinfo(np.int32).max  # as `key_enter`: a key that no query sees


class AttentionMask(NamedTuple):
    """Which keys a query sees, without a [Q, K] array: index and interval of either side.

    Key k is visible to query q iff `key_index[k] <= query_index[q]` and `key_enter[k] <= query_enter[q] < key_exit[k]`.
    With a token's interval `[enter, exit)` that of its node in a depth-first forest, that is exactly: k is q or one of
    its ancestors.
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
    """The mask of tokens at cache slots start, start + 1, ... over all slots up to their own."""
    slots = jnp.arange(enter.shape[-1], dtype=jnp.int32)[None]
    own = jnp.arange(query_enter.shape[-1], dtype=jnp.int32)[None] + start
    return AttentionMask(own, query_enter, slots, enter, exit, aligned=isinstance(start, int) and start == 0)


def dense_mask(mask: AttentionMask) -> Bool[Array, "rows queries keys"]:
    """The rule of `Visibility` spelled out as a mask."""
    query_index, query_enter = mask.query_index[..., :, None], mask.query_enter[..., :, None]
    key_index, key_enter, key_exit = (keys[..., None, :] for keys in mask[2:5])
    return (key_index <= query_index) & (key_enter <= query_enter) & (query_enter < key_exit)
