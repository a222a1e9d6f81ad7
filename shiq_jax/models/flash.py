"""FlashAttention as a Pallas kernel for GPU and TPU: scores live in a tile; tiles that nobody sees are left out.

FlashAttention-2 (Dao, 2023, arXiv 2307.08691) with the interval rule of `Visibility`, which is arithmetic on three
numbers per key and two per query, so that no mask exists outside a tile. Tiles are [keys, queries]: what belongs to a
query then lies along the lanes of a TPU, and its log-sum-exp takes four bytes and not five hundred. On a CPU the kernel
is interpreted: right and slow.
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

BLOCK = 128  # keys, and queries, of a tile: as many as a TPU has lanes
VMEM = 64 * 2**20  # bytes, of a TPU: a row's keys and values of one head lie there whole
WHOLE = slice(None)
LOWEST = float(jnp.finfo(jnp.float32).min)  # not -inf: a query that sees nothing then has a finite value


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def flash(
    q: Float[Array, "rows heads queries head_dim"],
    k: Float[Array, "rows kv_heads keys head_dim"],
    v: Float[Array, "rows kv_heads keys head_dim"],
    mask: AttentionMask,
    scale: float,
    aligned: bool,
) -> Float[Array, "rows heads queries head_dim"]:
    """softmax(scale * q k^T) v over the visible keys, in the dtype of `v`, the softmax in float32.

    aligned: query i and key i stand at the same index, so that no query sees a key behind its own; it stands apart from
    the mask, being no array.
    """
    return _forward(q, k, v, mask, scale, aligned)[0]


def _forward(q, k, v, mask: AttentionMask, scale: float, aligned: bool):
    marks, padded = _marks(mask, len(q)), [_padded(each) for each in (q, k, v)]
    parts = _Parts(*(each.shape for each in padded[:2]))
    out, lse = parts.call(
        functools.partial(_forward_kernel, scale, aligned), parts.queries,
        [(marks[0], parts.query_marks), (marks[1], parts.all_key_marks), (padded[0], parts.tile),
         (padded[1], parts.group), (padded[2], parts.group)],
        [(padded[0].shape, v.dtype, parts.tile), (parts.per_query, jnp.float32, parts.numbers)],
    )  # fmt: skip
    out, lse = checkpoint_name(out[:, :, : q.shape[2], : q.shape[3]], SAVED), checkpoint_name(lse, SAVED)
    return out, (q, k, v, mask, out, lse)


def _backward(scale: float, aligned: bool, kept, cotangent):
    q, k, v, mask, out, lse = kept
    delta = jnp.sum(cotangent.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)[:, :, None]
    delta = jnp.pad(delta, ((0, 0), (0, 0), (0, 0), (0, lse.shape[3] - delta.shape[3])))
    marks = _marks(mask, len(q))
    padded = [_padded(each) for each in (q, k, v, cotangent.astype(v.dtype))]
    parts = _Parts(*(each.shape for each in padded[:2]))
    (dq,) = parts.call(
        functools.partial(_query_kernel, scale, aligned), parts.queries,
        [(marks[0], parts.query_marks), (marks[1], parts.all_key_marks), (padded[0], parts.tile),
         (padded[1], parts.group), (padded[2], parts.group), (padded[3], parts.tile), (lse, parts.numbers),
         (delta, parts.numbers)],
        [(padded[0].shape, q.dtype, parts.tile)],
    )  # fmt: skip
    # Every head has its own part of the gradients of its group's keys and values.
    each_head = (*q.shape[:2], *padded[1].shape[2:])
    dk, dv = parts.call(
        functools.partial(_key_kernel, scale, aligned), parts.keys,
        [(marks[0], parts.all_query_marks), (marks[1], parts.key_marks), (padded[0], parts.head),
         (padded[1], parts.group_tile), (padded[2], parts.group_tile), (padded[3], parts.head),
         (lse, parts.all_numbers), (delta, parts.all_numbers)],
        [(each_head, jnp.float32, parts.tile)] * 2,
    )  # fmt: skip

    def of_group(x):
        return x.reshape(*k.shape[:2], -1, *x.shape[2:]).sum(2)[:, :, : k.shape[2], : k.shape[3]]

    dq = dq[:, :, : q.shape[2], : q.shape[3]]
    return dq, of_group(dk).astype(k.dtype), of_group(dv).astype(v.dtype), None


flash.defvjp(_forward, _backward)


def _forward_kernel(scale, aligned, query_marks, key_marks, q, k, v, out, lse):
    """Output and log-sum-exp of a tile of queries, over the keys block by block."""
    queries = q[...]

    def meet(block, seen, carry):
        top, total, mixed = carry
        scores = jnp.where(seen, _scores(k[block, :], queries, scale), LOWEST)
        higher = jnp.maximum(top, jnp.max(scores, axis=0, keepdims=True))
        weights, fade = jnp.exp(scores - higher), jnp.exp(top - higher)
        values = v[block, :]
        mixed = mixed * fade + _product(values, weights.astype(values.dtype), (0, 0))
        return higher, total * fade + jnp.sum(weights, axis=0, keepdims=True), mixed

    numbers = jnp.zeros((1, BLOCK), jnp.float32)
    start = numbers + LOWEST, numbers, jnp.zeros((v.shape[1], BLOCK), jnp.float32)
    top, total, mixed = _over_keys(meet, start, aligned, query_marks, key_marks)
    # Nothing at all was seen where the total is 0.
    total = jnp.maximum(total, 1e-30)
    out[...] = (mixed / total).T.astype(out.dtype)
    lse[...] = top + jnp.log(total)


def _query_kernel(scale, aligned, query_marks, key_marks, q, k, v, cotangent, lse, delta, dq):
    """Gradient of a tile of queries."""
    queries, arriving, lse, delta = q[...], cotangent[...], lse[...], delta[...]

    def meet(block, seen, sums):
        keys = k[block, :]
        weights = jnp.where(seen, jnp.exp(_scores(keys, queries, scale) - lse), 0)
        slope = weights * (_product(v[block, :], arriving, (1, 1)) - delta) * scale
        return sums + _product(slope.astype(keys.dtype), keys, (0, 0))

    start = jnp.zeros(queries.shape, jnp.float32)
    dq[...] = _over_keys(meet, start, aligned, query_marks, key_marks).astype(dq.dtype)


def _key_kernel(scale, aligned, query_marks, key_marks, q, k, v, cotangent, lse, delta, dk, dv):
    """Gradients of a tile of keys and values from one head, over the queries block by block."""
    keys, values = k[...], v[...]

    def meet(number, sums):
        block = pl.ds(pl.multiple_of(number * BLOCK, BLOCK), BLOCK)
        seen = _seen(query_marks, block, key_marks, WHOLE)

        def add(sums):
            queries, arriving = q[block, :], cotangent[block, :]
            weights = jnp.where(seen, jnp.exp(_scores(keys, queries, scale) - lse[:, block]), 0)
            slope = weights * (_product(values, arriving, (1, 1)) - delta[:, block]) * scale
            more = _product(slope.astype(queries.dtype), queries, (1, 0))
            return sums[0] + more, sums[1] + _product(weights.astype(arriving.dtype), arriving, (1, 0))

        return jax.lax.cond(_any(seen), add, lambda sums: sums, sums)

    zeros = jnp.zeros(keys.shape, jnp.float32)
    first = pl.program_id(2) if aligned else 0
    dk[...], dv[...] = jax.lax.fori_loop(first, q.shape[0] // BLOCK, meet, (zeros, zeros))


def _over_keys(meet: Callable, start, aligned: bool, query_marks, key_marks):
    """`meet(block, seen, carry)` for the blocks of keys of which some query of the tile sees some key."""

    def one(number, carry):
        block = pl.ds(pl.multiple_of(number * BLOCK, BLOCK), BLOCK)
        seen = _seen(query_marks, WHOLE, key_marks, block)
        return jax.lax.cond(_any(seen), lambda carry: meet(block, seen, carry), lambda carry: carry, carry)

    stop = pl.program_id(2) + 1 if aligned else key_marks.shape[0] // BLOCK
    return jax.lax.fori_loop(0, stop, one, start)


def _seen(query_marks, queries, key_marks, keys):
    """`attention_mask.dense_mask` in a tile [keys, queries]."""
    query_index, query_enter = (query_marks[mark : mark + 1, queries] for mark in range(2))
    key_index, key_enter, key_exit = (key_marks[keys, mark : mark + 1] for mark in range(3))
    return (key_index <= query_index) & (key_enter <= query_enter) & (query_enter < key_exit)


def _any(seen):
    return jnp.max(seen.astype(jnp.float32)) > 0


def _scores(keys, queries, scale: float):
    return _product(keys, queries, (1, 1)) * scale


def _product(a, b, contracted: tuple[int, int]):
    axes = (((contracted[0],), (contracted[1],)), ((), ()))
    return jax.lax.dot_general(a, b, axes, preferred_element_type=jnp.float32)


def _padded(x):
    """Whole blocks of positions, and a head dimension that a GPU's matrix products take."""
    head_dim = max(pl.next_power_of_2(x.shape[3]), 16)
    return jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % BLOCK), (0, head_dim - x.shape[3])))


def _marks(mask: AttentionMask, rows: int):
    """int32[rows, 2, queries] and int32[rows, keys, 4]; what is padded sees nothing, and nothing sees it."""

    def stacked(marks, axis: int, fill: int):
        marks = jnp.stack([jnp.broadcast_to(mark, (rows, mark.shape[1])) for mark in marks], axis).astype(jnp.int32)
        short = -marks.shape[3 - axis] % BLOCK
        return jnp.pad(marks, ((0, 0), *(((0, 0), (0, short)) if axis == 1 else ((0, short), (0, 0)))),
                       constant_values=fill)  # fmt: skip

    of_keys = stacked((*mask[2:5], mask.key_exit), 2, 0)
    return stacked(mask[:2], 1, -1), of_keys


class _Parts:
    """Which part of an array a program of the grid (rows, heads, tiles) gets: specifications by what they hold."""

    def __init__(self, q: tuple[int, ...], k: tuple[int, ...]):
        self._rows, self._heads, queries, head_dim = q
        together, keys = self._heads // k[1], k[2]
        self.queries, self.keys = queries // BLOCK, keys // BLOCK
        self.per_query = (self._rows, self._heads, 1, queries)
        self.tile = pl.BlockSpec((None, None, BLOCK, head_dim), lambda row, head, tile: (row, head, tile, 0))
        self.head = pl.BlockSpec((None, None, queries, head_dim), lambda row, head, tile: (row, head, 0, 0))
        self.group_tile = pl.BlockSpec(
            (None, None, BLOCK, head_dim), lambda row, head, tile: (row, head // together, tile, 0)
        )
        self.group = pl.BlockSpec((None, None, keys, head_dim), lambda row, head, tile: (row, head // together, 0, 0))
        self.numbers = pl.BlockSpec((None, None, 1, BLOCK), lambda row, head, tile: (row, head, 0, tile))
        self.all_numbers = pl.BlockSpec((None, None, 1, queries), lambda row, head, tile: (row, head, 0, 0))
        self.query_marks = pl.BlockSpec((None, 2, BLOCK), lambda row, head, tile: (row, 0, tile))
        self.all_query_marks = pl.BlockSpec((None, 2, queries), lambda row, head, tile: (row, 0, 0))
        self.key_marks = pl.BlockSpec((None, BLOCK, 4), lambda row, head, tile: (row, tile, 0))
        self.all_key_marks = pl.BlockSpec((None, keys, 4), lambda row, head, tile: (row, 0, 0))

    def call(self, kernel: Callable, tiles: int, inputs, outputs):
        """The kernel over all rows, heads and tiles; inputs are (array, part), outputs (shape, dtype, part)."""
        arrays, parts = zip(*inputs)

        def run(*arrays, **options):
            return pl.pallas_call(
                kernel,
                grid=(self._rows, self._heads, tiles),
                in_specs=list(parts),
                out_specs=[part for _, _, part in outputs],
                out_shape=[jax.ShapeDtypeStruct(shape, dtype) for shape, dtype, _ in outputs],
                **options,
            )(*arrays)

        gpu = functools.partial(run, compiler_params=triton.CompilerParams())
        return jax.lax.platform_dependent(
            *arrays, cpu=functools.partial(run, interpret=True), cuda=gpu, rocm=gpu,
            tpu=functools.partial(run, compiler_params=pltpu.CompilerParams(vmem_limit_bytes=VMEM)),
        )  # fmt: skip
