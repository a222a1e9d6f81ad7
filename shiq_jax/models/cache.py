"""Keys and values of the tokens that a decoder has already read."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from shiq_jax.models.config import DecoderConfig


class Cache(NamedTuple):
    """Slots written so far; the same slots for every sequence, those of padding marked not valid."""

    keys: Float[Array, "layers batch slots kv_heads head_dim"]
    values: Float[Array, "layers batch slots kv_heads head_dim"]
    valid: Bool[Array, "batch slots"]


LOGICAL_AXES = Cache(
    keys=("layers", "rows", None, "kv_heads", "head_dim"),
    values=("layers", "rows", None, "kv_heads", "head_dim"),
    valid=("rows", None),
)


def empty(config: DecoderConfig, batch: int, length: int, dtype) -> Cache:
    """A cache of `length` slots for `batch` sequences, none of them valid."""
    shape = (config.num_layers, batch, length, config.num_kv_heads, config.head_dim)
    return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros((batch, length), bool))


def repeat(cache: Cache, times: int) -> Cache:
    """Every sequence `times` times, the copies of one next to each other: its continuations share what was read."""
    return Cache(
        jnp.repeat(cache.keys, times, 1), jnp.repeat(cache.values, times, 1), jnp.repeat(cache.valid, times, 0)
    )


def write(cache: Cache, layer: jax.Array, keys: jax.Array, values: jax.Array, start: jax.Array | int) -> Cache:
    """The cache with one layer's `keys`, `values` [batch, tokens, kv_heads, head_dim] at slots start, start + 1, ..."""
    where = (layer, 0, start, 0, 0)
    return cache._replace(
        keys=jax.lax.dynamic_update_slice(cache.keys, keys[None].astype(cache.keys.dtype), where),
        values=jax.lax.dynamic_update_slice(cache.values, values[None].astype(cache.values.dtype), where),
    )
