"""FlashAttention as a Pallas kernel for GPU and TPU: scores exist only per tile, and fully masked tiles are skipped.

FlashAttention-2 (Dao, 2023, arXiv 2307.08691) with the interval rule of `AttentionMask`, which is computed within each
tile from three integers per key and two per query. Tiles are [keys, queries], so that per-query values such as the
log-sum-exp lie along the lanes of a TPU instead of being padded to a full lane each. On CPU the kernel runs in
interpret mode, for tests only.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton
from jaxtyping import Array, Float

from shiq_jax.models.attention_mask import AttentionMask
from shiq_jax.models.blockwise import SAVED

BLOCK = 128  # keys and queries per tile, the lane width of a TPU
VMEM = 64 * 2**20  # bytes; on TPU all keys and values of one row and kv head are resident in VMEM
ALL = slice(None)
LOWEST = float(jnp.finfo(jnp.float32).min)  # finite, so that a query without visible keys has a finite output


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def flash(
    q: Float[Array, "rows heads queries head_dim"],
    k: Float[Array, "rows kv_heads keys head_dim"],
    v: Float[Array, "rows kv_heads keys head_dim"],
    mask: AttentionMask,
    scale: float,
    aligned: bool,
) -> Float[Array, "rows heads queries head_dim"]:
    """softmax(scale * q k^T) v over the visible keys, in the dtype of `v`, with the softmax in float32.

    aligned: as `AttentionMask.aligned`; a separate argument because it must be static under `custom_vjp`.
    """
    return _forward(q, k, v, mask, scale, aligned)[0]


def _forward(q, k, v, mask: AttentionMask, scale: float, aligned: bool):
    query_mask, key_mask = _pack_mask(mask, len(q))
    padded_q, padded_k, padded_v = _pad(q), _pad(k), _pad(v)
    specs = _BlockSpecs(padded_q.shape, padded_k.shape)
    out, lse = specs.call(
        functools.partial(_forward_kernel, scale, aligned), specs.query_tiles,
        [(query_mask, specs.query_mask), (key_mask, specs.all_key_masks), (padded_q, specs.tile),
         (padded_k, specs.all_keys), (padded_v, specs.all_keys)],
        [(padded_q.shape, v.dtype, specs.tile), (specs.per_query_shape, jnp.float32, specs.per_query)],
    )  # fmt: skip
    out, lse = checkpoint_name(out[:, :, : q.shape[2], : q.shape[3]], SAVED), checkpoint_name(lse, SAVED)
    return out, (q, k, v, mask, out, lse)


def _backward(scale: float, aligned: bool, residuals, cotangent):
    q, k, v, mask, out, lse = residuals
    delta = jnp.sum(cotangent.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)[:, :, None]
    delta = jnp.pad(delta, ((0, 0), (0, 0), (0, 0), (0, lse.shape[3] - delta.shape[3])))
    query_mask, key_mask = _pack_mask(mask, len(q))
    padded_q, padded_k, padded_v, padded_cotangent = (_pad(x) for x in (q, k, v, cotangent.astype(v.dtype)))
    specs = _BlockSpecs(padded_q.shape, padded_k.shape)
    (dq,) = specs.call(
        functools.partial(_query_gradient_kernel, scale, aligned), specs.query_tiles,
        [(query_mask, specs.query_mask), (key_mask, specs.all_key_masks), (padded_q, specs.tile),
         (padded_k, specs.all_keys), (padded_v, specs.all_keys), (padded_cotangent, specs.tile),
         (lse, specs.per_query), (delta, specs.per_query)],
        [(padded_q.shape, q.dtype, specs.tile)],
    )  # fmt: skip
    # Each query head computes its own contribution to the gradients of its kv head; they are summed below.
    per_head_shape = (*q.shape[:2], *padded_k.shape[2:])
    dk, dv = specs.call(
        functools.partial(_key_gradient_kernel, scale, aligned), specs.key_tiles,
        [(query_mask, specs.all_query_masks), (key_mask, specs.key_mask), (padded_q, specs.all_queries),
         (padded_k, specs.key_tile), (padded_v, specs.key_tile), (padded_cotangent, specs.all_queries),
         (lse, specs.all_per_query), (delta, specs.all_per_query)],
        [(per_head_shape, jnp.float32, specs.tile)] * 2,
    )  # fmt: skip

    def sum_heads(x):
        return x.reshape(*k.shape[:2], -1, *x.shape[2:]).sum(2)[:, :, : k.shape[2], : k.shape[3]]

    dq = dq[:, :, : q.shape[2], : q.shape[3]]
    return dq, sum_heads(dk).astype(k.dtype), sum_heads(dv).astype(v.dtype), None


flash.defvjp(_forward, _backward)


def _forward_kernel(scale, aligned, query_mask, key_mask, q, k, v, out, lse):
    """Output and log-sum-exp of a tile of queries, over the keys block by block."""
    queries = q[...]

    def update(block, visible, carry):
        maximum, total, weighted = carry
        scores = jnp.where(visible, _scores(k[block, :], queries, scale), LOWEST)
        new_maximum = jnp.maximum(maximum, jnp.max(scores, axis=0, keepdims=True))
        weights, decay = jnp.exp(scores - new_maximum), jnp.exp(maximum - new_maximum)
        values = v[block, :]
        weighted = weighted * decay + _matmul(values, weights.astype(values.dtype), (0, 0))
        return new_maximum, total * decay + jnp.sum(weights, axis=0, keepdims=True), weighted

    zeros = jnp.zeros((1, BLOCK), jnp.float32)
    init = zeros + LOWEST, zeros, jnp.zeros((v.shape[1], BLOCK), jnp.float32)
    maximum, total, weighted = _loop_over_keys(update, init, aligned, query_mask, key_mask)
    # The total is 0 for queries without visible keys.
    total = jnp.maximum(total, 1e-30)
    out[...] = (weighted / total).T.astype(out.dtype)
    lse[...] = maximum + jnp.log(total)


def _query_gradient_kernel(scale, aligned, query_mask, key_mask, q, k, v, cotangent, lse, delta, dq):
    """Gradient of a tile of queries."""
    queries, cotangent, lse, delta = q[...], cotangent[...], lse[...], delta[...]

    def update(block, visible, total):
        keys = k[block, :]
        weights = jnp.where(visible, jnp.exp(_scores(keys, queries, scale) - lse), 0)
        dscores = weights * (_matmul(v[block, :], cotangent, (1, 1)) - delta) * scale
        return total + _matmul(dscores.astype(keys.dtype), keys, (0, 0))

    init = jnp.zeros(queries.shape, jnp.float32)
    dq[...] = _loop_over_keys(update, init, aligned, query_mask, key_mask).astype(dq.dtype)


def _key_gradient_kernel(scale, aligned, query_mask, key_mask, q, k, v, cotangent, lse, delta, dk, dv):
    """One query head's contribution to the gradients of a tile of keys and values, over the queries block by block."""
    keys, values = k[...], v[...]

    def update(index, sums):
        block = pl.ds(pl.multiple_of(index * BLOCK, BLOCK), BLOCK)
        visible = _visible(query_mask, block, key_mask, ALL)

        def add(sums):
            queries, block_cotangent = q[block, :], cotangent[block, :]
            weights = jnp.where(visible, jnp.exp(_scores(keys, queries, scale) - lse[:, block]), 0)
            dscores = weights * (_matmul(values, block_cotangent, (1, 1)) - delta[:, block]) * scale
            block_dk = _matmul(dscores.astype(queries.dtype), queries, (1, 0))
            block_dv = _matmul(weights.astype(block_cotangent.dtype), block_cotangent, (1, 0))
            return sums[0] + block_dk, sums[1] + block_dv

        return jax.lax.cond(_any(visible), add, lambda sums: sums, sums)

    zeros = jnp.zeros(keys.shape, jnp.float32)
    start = pl.program_id(2) if aligned else 0
    dk[...], dv[...] = jax.lax.fori_loop(start, q.shape[0] // BLOCK, update, (zeros, zeros))


def _loop_over_keys(update: Callable, init, aligned: bool, query_mask, key_mask):
    """Fold `update(block, visible, carry)` over the key blocks with a key visible to some query of the tile."""

    def step(index, carry):
        block = pl.ds(pl.multiple_of(index * BLOCK, BLOCK), BLOCK)
        visible = _visible(query_mask, ALL, key_mask, block)
        return jax.lax.cond(_any(visible), lambda carry: update(block, visible, carry), lambda carry: carry, carry)

    stop = pl.program_id(2) + 1 if aligned else key_mask.shape[0] // BLOCK
    return jax.lax.fori_loop(0, stop, step, init)


def _visible(query_mask, queries, key_mask, keys):
    """`attention_mask.dense_mask` for a tile [keys, queries]."""
    query_index, query_enter = (query_mask[field : field + 1, queries] for field in range(2))
    key_index, key_enter, key_exit = (key_mask[keys, field : field + 1] for field in range(3))
    return (key_index <= query_index) & (key_enter <= query_enter) & (query_enter < key_exit)


def _any(visible):
    return jnp.max(visible.astype(jnp.float32)) > 0


def _scores(keys, queries, scale: float):
    return _matmul(keys, queries, (1, 1)) * scale


def _matmul(a, b, contracted: tuple[int, int]):
    axes = (((contracted[0],), (contracted[1],)), ((), ()))
    return jax.lax.dot_general(a, b, axes, preferred_element_type=jnp.float32)


def _pad(x):
    """Pad positions to whole blocks, and head_dim to a size that Triton's matrix products accept."""
    head_dim = max(pl.next_power_of_2(x.shape[3]), 16)
    return jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % BLOCK), (0, head_dim - x.shape[3])))


def _pack_mask(mask: AttentionMask, rows: int):
    """Mask fields as int32[rows, 2, queries] and int32[rows, keys, 4]; padding sees no key and is seen by no query."""

    def stack(fields, axis: int, padding: int):
        stacked = jnp.stack([jnp.broadcast_to(field, (rows, field.shape[1])) for field in fields], axis)
        stacked = stacked.astype(jnp.int32)
        short = -stacked.shape[3 - axis] % BLOCK
        return jnp.pad(stacked, ((0, 0), *(((0, 0), (0, short)) if axis == 1 else ((0, short), (0, 0)))),
                       constant_values=padding)  # fmt: skip

    # The repeated field pads the last dimension to four.
    key_fields = stack((*mask[2:5], mask.key_exit), 2, 0)
    return stack(mask[:2], 1, -1), key_fields


class _BlockSpecs:
    """Block specifications of the operands, and the call of a kernel over the grid (rows, heads, tiles)."""

    def __init__(self, q: tuple[int, ...], k: tuple[int, ...]):
        self._rows, self._heads, queries, head_dim = q
        group, keys = self._heads // k[1], k[2]
        self.query_tiles, self.key_tiles = queries // BLOCK, keys // BLOCK
        self.per_query_shape = (self._rows, self._heads, 1, queries)
        self.tile = pl.BlockSpec((None, None, BLOCK, head_dim), lambda row, head, tile: (row, head, tile, 0))
        self.all_queries = pl.BlockSpec((None, None, queries, head_dim), lambda row, head, tile: (row, head, 0, 0))
        self.key_tile = pl.BlockSpec(
            (None, None, BLOCK, head_dim), lambda row, head, tile: (row, head // group, tile, 0)
        )
        self.all_keys = pl.BlockSpec((None, None, keys, head_dim), lambda row, head, tile: (row, head // group, 0, 0))
        self.per_query = pl.BlockSpec((None, None, 1, BLOCK), lambda row, head, tile: (row, head, 0, tile))
        self.all_per_query = pl.BlockSpec((None, None, 1, queries), lambda row, head, tile: (row, head, 0, 0))
        self.query_mask = pl.BlockSpec((None, 2, BLOCK), lambda row, head, tile: (row, 0, tile))
        self.all_query_masks = pl.BlockSpec((None, 2, queries), lambda row, head, tile: (row, 0, 0))
        self.key_mask = pl.BlockSpec((None, BLOCK, 4), lambda row, head, tile: (row, tile, 0))
        self.all_key_masks = pl.BlockSpec((None, keys, 4), lambda row, head, tile: (row, 0, 0))

    def call(self, kernel: Callable, tiles: int, inputs, outputs):
        """Run the kernel over all rows, heads and tiles; inputs are (array, spec), outputs (shape, dtype, spec)."""
        arrays, in_specs = zip(*inputs)

        def run(*arrays, **options):
            return pl.pallas_call(
                kernel,
                grid=(self._rows, self._heads, tiles),
                in_specs=list(in_specs),
                out_specs=[spec for _, _, spec in outputs],
                out_shape=[jax.ShapeDtypeStruct(shape, dtype) for shape, dtype, _ in outputs],
                **options,
            )(*arrays)

        gpu = functools.partial(run, compiler_params=triton.CompilerParams())
        return jax.lax.platform_dependent(
            *arrays, cpu=functools.partial(run, interpret=True), cuda=gpu, rocm=gpu,
            tpu=functools.partial(run, compiler_params=pltpu.CompilerParams(vmem_limit_bytes=VMEM)),
        )  # fmt: skip
