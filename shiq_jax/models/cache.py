"""Keys and values of the tokens that a decoder has already read."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from shiq_jax.models.attention import NEVER
from shiq_jax.models.config import DecoderConfig


class Cache(NamedTuple):
    """Slots written so far, and the interval of each: one row may hold a prompt and several continuations of it.

    Who sees whom is the rule of `attention.Visibility`; a slot that was not written, or holds padding, enters never.
    """

    keys: Float[Array, "layers batch kv_heads slots head_dim"]
    values: Float[Array, "layers batch kv_heads slots head_dim"]
    enter: Int[Array, "batch slots"]
    exit: Int[Array, "batch slots"]


LOGICAL_AXES = Cache(
    keys=("layers", "rows", "kv_heads", None, "head_dim"),
    values=("layers", "rows", "kv_heads", None, "head_dim"),
    enter=("rows", None),
    exit=("rows", None),
)


def empty(config: DecoderConfig, batch: int, length: int, dtype) -> Cache:
    """A cache of `length` slots for `batch` rows, none of them written."""
    shape = (config.num_layers, batch, config.num_kv_heads, length, config.head_dim)
    unwritten = jnp.full((batch, length), NEVER, jnp.int32)
    return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), unwritten, jnp.zeros_like(unwritten))


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
    where = (layer, 0, 0, start, 0)
    keys, values = (each.transpose(0, 2, 1, 3)[None].astype(cache.keys.dtype) for each in (keys, values))
    return cache._replace(
        keys=jax.lax.dynamic_update_slice(cache.keys, keys, where),
        values=jax.lax.dynamic_update_slice(cache.values, values, where),
    )


def read(cache: Cache, layer: jax.Array) -> tuple[jax.Array, jax.Array]:
    """One layer's keys and values, each [batch, slots, kv_heads, head_dim]."""
    keys, values = (jax.lax.dynamic_index_in_dim(each, layer, 0, False) for each in cache[:2])
    return keys.transpose(0, 2, 1, 3), values.transpose(0, 2, 1, 3)
