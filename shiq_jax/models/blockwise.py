"""Exact attention in blocks of queries, with its own backward pass: memory grows with the length, not with its square.

FlashAttention-2 (Dao, 2023, arXiv 2307.08691) without its loop over keys: a block of queries meets all the keys that it
can see at once, and only the output and the log-sum-exp of its scores are kept. Arrays are `q` [rows, groups, heads of
a group, queries, head_dim] and `k`, `v` [rows, groups, keys, head_dim]: batched products of contiguous matrices are
what backends are fast at.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from shiq_jax.models.attention_mask import AttentionMask, dense_mask

BLOCK = 128  # queries; a block's scores over some thousand keys fit into a CPU core's cache
LEVELS = 8  # different numbers of keys, each a piece of program: the last half of a level sees more keys than it need

# What a rematerialisation policy may keep, so that the forward pass need not be run again for the backward one.
SAVED = "attention"


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def attend(
    q, k, v, mask: AttentionMask, scale: float, aligned: bool
) -> Float[Array, "rows groups together queries head_dim"]:
    """softmax(scale * q k^T) v over the visible keys, in the dtype of `v`, the softmax in float32 at least.

    aligned: query i and key i stand at the same index, so that no query sees a key behind its own; it stands apart from
    the mask, being no array.
    """
    return _forward(q, k, v, mask, scale, aligned)[0]


def _forward(q, k, v, mask: AttentionMask, scale: float, aligned: bool):
    length, size = q.shape[3], _size(q.shape[3])
    queries, marks = _cut(q, size), _marks(mask, size)
    out, lse = [], []
    for blocks, keys in _levels(len(queries), size, k.shape[2], aligned):
        block = functools.partial(_block, k[:, :, :keys], v[:, :, :keys], _keys(mask, keys), scale)
        found = _each(block, (queries[blocks], *(mark[blocks] for mark in marks)))
        out.append(found[0])
        lse.append(found[1])
    out, lse = jnp.concatenate(out), jnp.concatenate(lse)
    out, lse = checkpoint_name(_join(out, length), SAVED), checkpoint_name(lse, SAVED)
    return out, (q, k, v, mask, out, lse)


def _backward(scale: float, aligned: bool, kept, cotangent):
    q, k, v, mask, out, lse = kept
    length, size = q.shape[3], _size(q.shape[3])
    precise = jnp.promote_types(q.dtype, jnp.float32)
    delta = jnp.sum(cotangent.astype(precise) * out.astype(precise), axis=-1, keepdims=True)
    blocks_of = (
        _cut(q, size),
        _cut(cotangent.astype(v.dtype), size),
        _cut(delta, size),
        lse,
        *_marks(mask, size),
    )
    dq, dk, dv = [], jnp.zeros(k.shape, precise), jnp.zeros(v.shape, precise)
    for blocks, keys in _levels(len(lse), size, k.shape[2], aligned):
        block = functools.partial(_block_gradient, k[:, :, :keys], v[:, :, :keys], _keys(mask, keys), scale)

        def add(sums, one, block=block):
            gradient, *more = block(*one)
            return jax.tree.map(jnp.add, sums, tuple(more)), gradient

        before = dk[:, :, :keys], dv[:, :, :keys]
        sums, gradient = _scan(add, before, tuple(each[blocks] for each in blocks_of))
        dk, dv = (whole.at[:, :, :keys].set(part) for whole, part in zip((dk, dv), sums))
        dq.append(gradient)
    dq = _join(jnp.concatenate(dq), length).astype(q.dtype)
    return dq, dk.astype(k.dtype), dv.astype(v.dtype), None


attend.defvjp(_forward, _backward)


def _block(k, v, keys, scale: float, q, query_index, query_enter):
    """Output and log-sum-exp of one block of queries."""
    scores = _scores(q, k, scale)
    # The most negative finite number, not -inf: a query that sees nothing then has a finite value.
    seen = dense_mask(AttentionMask(query_index, query_enter, *keys))[:, None, None]
    scores = jnp.where(seen, scores, jnp.finfo(scores.dtype).min)
    top = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    mixed = jnp.einsum("bgrqk,bgkd->bgrqd", weights.astype(v.dtype), v, preferred_element_type=scores.dtype)
    return (mixed / total).astype(v.dtype), top + jnp.log(total)


def _block_gradient(k, v, keys, scale: float, q, cotangent, delta, lse, query_index, query_enter):
    """Gradients of one block: of its queries, and its parts of those of the keys and values."""
    seen = dense_mask(AttentionMask(query_index, query_enter, *keys))[:, None, None]
    weights = jnp.where(seen, jnp.exp(_scores(q, k, scale) - lse), 0)
    precise = weights.dtype
    product = functools.partial(jnp.einsum, preferred_element_type=precise)
    dv = product("bgrqk,bgrqd->bgkd", weights.astype(v.dtype), cotangent)
    slope = weights * (product("bgrqd,bgkd->bgrqk", cotangent, v) - delta) * scale
    slope = slope.astype(q.dtype)
    return product("bgrqk,bgkd->bgrqd", slope, k), product("bgrqk,bgrqd->bgkd", slope, q), dv


def _scores(q, k, scale: float):
    precise = jnp.promote_types(q.dtype, jnp.float32)
    return jnp.einsum("bgrqd,bgkd->bgrqk", q, k, preferred_element_type=precise) * scale


def _size(length: int) -> int:
    """Queries of a block: of as few equal blocks as `BLOCK` allows."""
    return -(-length // max(-(-length // BLOCK), 1))


def _levels(blocks: int, size: int, keys: int, aligned: bool) -> Iterator[tuple[slice, int]]:
    """Blocks that go through one piece of program, and how many keys they meet."""
    levels = min(blocks, LEVELS) if aligned else 1
    for level in range(levels):
        part = slice(level * blocks // levels, (level + 1) * blocks // levels)
        yield part, min(part.stop * size, keys) if aligned else keys


def _cut(x, size: int):
    """`[rows, groups, heads, queries, d] -> [blocks, rows, groups, heads, size, d]`, padded with zeros."""
    x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, -x.shape[3] % size), (0, 0)))
    return jnp.moveaxis(x.reshape(*x.shape[:3], -1, size, x.shape[-1]), 3, 0)


def _join(blocks, length: int):
    """The inverse of `_cut`."""
    joined = jnp.moveaxis(blocks, 0, 3)
    return joined.reshape(*joined.shape[:3], -1, joined.shape[-1])[:, :, :, :length]


def _marks(mask: AttentionMask, size: int):
    """Index and enter of the queries `[blocks, #rows, size]`; what was padded sees nothing."""
    padded = (jnp.pad(mark, ((0, 0), (0, -mark.shape[1] % size)), constant_values=-1) for mark in mask[:2])
    return tuple(jnp.moveaxis(mark.reshape(len(mark), -1, size), 1, 0) for mark in padded)


def _keys(mask: AttentionMask, keys: int):
    return tuple(mark[:, :keys] for mark in mask[2:5])


def _each(block: Callable, blocks):
    """`block` on every one of some stacked blocks, one after the other."""
    _, found = _scan(lambda carry, one: (carry, block(*one)), (), blocks)
    return found


def _scan(step: Callable, carry, blocks):
    """`lax.scan`, without a loop around a single block."""
    if len(blocks[0]) > 1:
        return jax.lax.scan(step, carry, blocks)
    carry, found = step(carry, jax.tree.map(lambda each: each[0], blocks))
    return carry, jax.tree.map(lambda each: each[None], found)
