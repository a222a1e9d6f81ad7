"""Keys and values of the tokens that a decoder has already read."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from shiq_jax.models.attention_mask import NEVER
from shiq_jax.models.config import DecoderConfig


class Cache(NamedTuple):
    """Slots written so far, and the interval of each: one row may hold a prompt and several continuations of it.

    Who sees whom is the rule of `attention.Visibility`; a slot that was not written, or holds padding, enters never.
    Keys are kept transposed, since few queries at a time meet many of them: that product is fast in this order only.
    """

    keys: Float[Array, "layers batch kv_heads head_dim slots"]
    values: Float[Array, "layers batch kv_heads slots head_dim"]
    enter: Int[Array, "batch slots"]
    exit: Int[Array, "batch slots"]


class Branches(NamedTuple):
    """What several sequences of each row have read beyond what the row's `Cache` holds, the same slots for all.

    The slots are a ring: at every step each sequence writes one token to the slot of that step, so that a sequence that
    begins later needs no clearing of what its predecessor left, only to know how many tokens back are its own.
    """

    keys: Float[Array, "layers batch branches kv_heads head_dim slots"]
    values: Float[Array, "layers batch branches kv_heads slots head_dim"]


LOGICAL_AXES = Cache(
    keys=("layers", "rows", "kv_heads", "head_dim", None),
    values=("layers", "rows", "kv_heads", None, "head_dim"),
    enter=("rows", None),
    exit=("rows", None),
)

BRANCH_AXES = Branches(
    keys=("layers", "rows", None, "kv_heads", "head_dim", None),
    values=("layers", "rows", None, "kv_heads", None, "head_dim"),
)


def empty(config: DecoderConfig, batch: int, length: int, dtype) -> Cache:
    """A cache of `length` slots for `batch` rows, none of them written."""
    shape = (config.num_layers, batch, config.num_kv_heads)
    keys, values = ((*shape, config.head_dim, length), (*shape, length, config.head_dim))
    unwritten = jnp.full((batch, length), NEVER, jnp.int32)
    return Cache(jnp.zeros(keys, dtype), jnp.zeros(values, dtype), unwritten, jnp.zeros_like(unwritten))


def empty_branches(config: DecoderConfig, batch: int, branches: int, length: int, dtype) -> Branches:
    """A ring of `length` slots for each of `branches` sequences of `batch` rows."""
    shape = (config.num_layers, batch, branches, config.num_kv_heads)
    keys, values = ((*shape, config.head_dim, length), (*shape, length, config.head_dim))
    return Branches(jnp.zeros(keys, dtype), jnp.zeros(values, dtype))


def intervals_of(valid: Bool[Array, "*shape"], enter=0, exit=NEVER) -> Int[Array, "*shape 2"]:
    """Intervals [enter, exit) of tokens, and of those that are not `valid` the one that is never seen.

    By default what comes later sees them all, whatever it enters; continuation j of a prompt has [j, j + 1).
    """
    return jnp.stack([jnp.where(valid, enter, NEVER), jnp.where(valid, exit, 0)], axis=-1).astype(jnp.int32)


def note(cache: Cache, intervals: Int[Array, "batch new 2"], start: jax.Array | int) -> Cache:
    """The cache with the intervals of the tokens that go to slots start, start + 1, ..."""
    enter = jax.lax.dynamic_update_slice(cache.enter, intervals[..., 0], (0, start))
    return cache._replace(enter=enter, exit=jax.lax.dynamic_update_slice(cache.exit, intervals[..., 1], (0, start)))


def write(cache: Cache, layer: jax.Array, keys: jax.Array, values: jax.Array, start: jax.Array | int) -> Cache:
    """The cache with one layer's `keys`, `values` [batch, new, kv_heads, head_dim] at slots start, start + 1, ..."""
    keys, values = keys.transpose(0, 2, 3, 1)[None], values.transpose(0, 2, 1, 3)[None]
    return cache._replace(
        keys=jax.lax.dynamic_update_slice(cache.keys, keys.astype(cache.keys.dtype), (layer, 0, 0, 0, start)),
        values=jax.lax.dynamic_update_slice(cache.values, values.astype(cache.values.dtype), (layer, 0, 0, start, 0)),
    )


def read(cache: Cache, layer: jax.Array) -> tuple[jax.Array, jax.Array]:
    """One layer's keys and values, each [batch, slots, kv_heads, head_dim]."""
    keys, values = (jax.lax.dynamic_index_in_dim(each, layer, 0, False) for each in cache[:2])
    return keys.transpose(0, 3, 1, 2), values.transpose(0, 2, 1, 3)


def put(cache: Cache, rows: Int[Array, " some"], other: Cache) -> Cache:
    """The cache with some rows replaced by those of another one, which stand in the last slots; a row may come twice.

    What the replaced rows hold in earlier slots is not seen any more.
    """
    gap = cache.enter.shape[1] - other.enter.shape[1]
    enter = jnp.pad(other.enter, ((0, 0), (gap, 0)), constant_values=NEVER)
    other = other._replace(enter=enter, exit=jnp.pad(other.exit, ((0, 0), (gap, 0))))

    def one(number, cache: Cache) -> Cache:
        row = rows[number]
        places = Cache(keys=(0, row, 0, 0, gap), values=(0, row, 0, gap, 0), enter=(row, 0), exit=(row, 0))

        def placed(ours, theirs, where):
            batch = 1 if ours.ndim > 2 else 0
            theirs = jax.lax.dynamic_slice_in_dim(theirs, number, 1, batch)
            return jax.lax.dynamic_update_slice(ours, theirs, where)

        return Cache(*map(placed, cache, other, places))

    return jax.lax.fori_loop(0, len(rows), one, cache)


def grow(branches: Branches, layer: jax.Array, keys: jax.Array, values: jax.Array, slot: jax.Array) -> Branches:
    """The branches with one layer's `keys`, `values` [batch, branches, kv_heads, head_dim] at a slot."""
    keys, values = keys[None, ..., None], values[None, ..., None, :]
    return Branches(
        jax.lax.dynamic_update_slice(branches.keys, keys.astype(branches.keys.dtype), (layer, 0, 0, 0, 0, slot)),
        jax.lax.dynamic_update_slice(branches.values, values.astype(branches.values.dtype), (layer, 0, 0, 0, slot, 0)),
    )
