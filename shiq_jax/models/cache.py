"""Key-value cache of a decoder, with one ring buffer per branch for decoding several continuations of a row."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from shiq_jax.models.attention_mask import NEVER
from shiq_jax.models.config import DecoderConfig


class Cache(NamedTuple):
    """Keys, values and intervals of the slots of each row; a row may hold a prompt and several continuations of it.

    Visibility follows the interval rule of `AttentionMask`; unwritten slots and padding have `enter = NEVER`. Keys are
    stored transposed because decoding multiplies few queries with many keys, which is fast only in this layout.
    """

    keys: Float[Array, "layers batch kv_heads head_dim slots"]
    values: Float[Array, "layers batch kv_heads slots head_dim"]
    enter: Int[Array, "batch slots"]
    exit: Int[Array, "batch slots"]


class Branches(NamedTuple):
    """Keys and values of several continuations (branches) of each row of a `Cache`.

    The slots form a ring: decoding step s writes one token per branch to slot s modulo the number of slots. A branch
    that starts later reuses slots without clearing them, because it attends only to as many slots as it has tokens.
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
    """An empty cache of `length` slots for `batch` rows."""
    shape = (config.num_layers, batch, config.num_kv_heads)
    keys, values = ((*shape, config.head_dim, length), (*shape, length, config.head_dim))
    enter = jnp.full((batch, length), NEVER, jnp.int32)
    return Cache(jnp.zeros(keys, dtype), jnp.zeros(values, dtype), enter, jnp.zeros_like(enter))


def empty_branches(config: DecoderConfig, batch: int, branches: int, length: int, dtype) -> Branches:
    """An empty ring of `length` slots for each of `branches` continuations of `batch` rows."""
    shape = (config.num_layers, batch, branches, config.num_kv_heads)
    keys, values = ((*shape, config.head_dim, length), (*shape, length, config.head_dim))
    return Branches(jnp.zeros(keys, dtype), jnp.zeros(values, dtype))


def slot_intervals(valid: Bool[Array, "*shape"], enter=0, exit=NEVER) -> Int[Array, "*shape 2"]:
    """Intervals [enter, exit) of tokens; tokens that are not `valid` get an interval that no query sees.

    With the defaults every later token sees the valid ones. Continuation j of a prompt uses [j, j + 1).
    """
    return jnp.stack([jnp.where(valid, enter, NEVER), jnp.where(valid, exit, 0)], axis=-1).astype(jnp.int32)


def write_intervals(cache: Cache, intervals: Int[Array, "batch new 2"], start: jax.Array | int) -> Cache:
    """The cache with `intervals` written to slots start, start + 1, ..."""
    enter = jax.lax.dynamic_update_slice(cache.enter, intervals[..., 0], (0, start))
    return cache._replace(enter=enter, exit=jax.lax.dynamic_update_slice(cache.exit, intervals[..., 1], (0, start)))


def write_layer(cache: Cache, layer: jax.Array, keys: jax.Array, values: jax.Array, start: jax.Array | int) -> Cache:
    """The cache with one layer's `keys`, `values` [batch, new, kv_heads, head_dim] written to slots start, ..."""
    keys, values = keys.transpose(0, 2, 3, 1)[None], values.transpose(0, 2, 1, 3)[None]
    return cache._replace(
        keys=jax.lax.dynamic_update_slice(cache.keys, keys.astype(cache.keys.dtype), (layer, 0, 0, 0, start)),
        values=jax.lax.dynamic_update_slice(cache.values, values.astype(cache.values.dtype), (layer, 0, 0, start, 0)),
    )


def read_layer(cache: Cache, layer: jax.Array) -> tuple[jax.Array, jax.Array]:
    """One layer's keys and values, each [batch, slots, kv_heads, head_dim]."""
    keys, values = (jax.lax.dynamic_index_in_dim(x, layer, 0, False) for x in cache[:2])
    return keys.transpose(0, 3, 1, 2), values.transpose(0, 2, 1, 3)


def replace_rows(cache: Cache, rows: Int[Array, " some"], source: Cache) -> Cache:
    """The cache with row `rows[i]` replaced by row i of `source`, right-aligned in the slots; rows may repeat.

    Earlier slots of the replaced rows become invisible.
    """
    gap = cache.enter.shape[1] - source.enter.shape[1]
    enter = jnp.pad(source.enter, ((0, 0), (gap, 0)), constant_values=NEVER)
    source = source._replace(enter=enter, exit=jnp.pad(source.exit, ((0, 0), (gap, 0))))

    def replace_row(i, cache: Cache) -> Cache:
        row = rows[i]
        starts = Cache(keys=(0, row, 0, 0, gap), values=(0, row, 0, gap, 0), enter=(row, 0), exit=(row, 0))

        def copy(old, new, start):
            batch_axis = 1 if old.ndim > 2 else 0
            new = jax.lax.dynamic_slice_in_dim(new, i, 1, batch_axis)
            return jax.lax.dynamic_update_slice(old, new, start)

        return Cache(*map(copy, cache, source, starts))

    return jax.lax.fori_loop(0, len(rows), replace_row, cache)


def write_branches(
    branches: Branches, layer: jax.Array, keys: jax.Array, values: jax.Array, slot: jax.Array
) -> Branches:
    """The branches with one layer's `keys`, `values` [batch, branches, kv_heads, head_dim] written to a slot."""
    keys, values = keys[None, ..., None], values[None, ..., None, :]
    return Branches(
        jax.lax.dynamic_update_slice(branches.keys, keys.astype(branches.keys.dtype), (layer, 0, 0, 0, 0, slot)),
        jax.lax.dynamic_update_slice(branches.values, values.astype(branches.values.dtype), (layer, 0, 0, 0, slot, 0)),
    )
