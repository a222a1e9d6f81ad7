"""Exact attention computed in blocks of queries, with a custom backward pass: memory is linear in the length.

FlashAttention-2 (Dao, 2023, arXiv 2307.08691) without the loop over keys: each block of queries is scored against all
keys that it can see, and only the output and the log-sum-exp of the scores are saved. Arrays are `q` [rows, kv_heads,
query heads per kv head, queries, head_dim] and `k`, `v` [rows, kv_heads, keys, head_dim], because backends are fastest
on batched products of contiguous matrices.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from shiq_jax.models.attention_mask import AttentionMask, dense_mask

BLOCK = 128  # queries per block: the scores of a block over a few thousand keys fit in a CPU core's cache
# Number of key ranges, each compiled separately. Aligned queries need only the keys up to their own block; every block
# of a level is scored against the keys that the level's last block needs.
LEVELS = 8

# `checkpoint_name` of the residuals; a remat policy that saves them avoids a second forward pass.
SAVED = "attention"


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def attend(
    q, k, v, mask: AttentionMask, scale: float, aligned: bool
) -> Float[Array, "rows kv_heads group queries head_dim"]:
    """softmax(scale * q k^T) v over the visible keys, in the dtype of `v`, with the softmax in float32 or wider.

    aligned: as `AttentionMask.aligned`; a separate argument because it must be static under `custom_vjp`.
    """
    return _forward(q, k, v, mask, scale, aligned)[0]


def _forward(q, k, v, mask: AttentionMask, scale: float, aligned: bool):
    length, size = q.shape[3], _block_size(q.shape[3])
    inputs = (_split_blocks(q, size), *_query_mask_blocks(mask, size))
    outs, lses = [], []
    for blocks, num_keys in _levels(len(inputs[0]), size, k.shape[2], aligned):
        block = functools.partial(
            _block_forward, k[:, :, :num_keys], v[:, :, :num_keys], _key_mask(mask, num_keys), scale
        )
        out, lse = _map_blocks(block, tuple(x[blocks] for x in inputs))
        outs.append(out)
        lses.append(lse)
    out, lse = jnp.concatenate(outs), jnp.concatenate(lses)
    out, lse = checkpoint_name(_merge_blocks(out, length), SAVED), checkpoint_name(lse, SAVED)
    return out, (q, k, v, mask, out, lse)


def _backward(scale: float, aligned: bool, residuals, cotangent):
    q, k, v, mask, out, lse = residuals
    length, size = q.shape[3], _block_size(q.shape[3])
    wide = jnp.promote_types(q.dtype, jnp.float32)
    delta = jnp.sum(cotangent.astype(wide) * out.astype(wide), axis=-1, keepdims=True)
    inputs = (
        _split_blocks(q, size),
        _split_blocks(cotangent.astype(v.dtype), size),
        _split_blocks(delta, size),
        lse,
        *_query_mask_blocks(mask, size),
    )
    dqs, dk, dv = [], jnp.zeros(k.shape, wide), jnp.zeros(v.shape, wide)
    for blocks, num_keys in _levels(len(lse), size, k.shape[2], aligned):
        block = functools.partial(
            _block_backward, k[:, :, :num_keys], v[:, :, :num_keys], _key_mask(mask, num_keys), scale
        )

        def add(sums, block_inputs, block=block):
            dq, dk, dv = block(*block_inputs)
            return jax.tree.map(jnp.add, sums, (dk, dv)), dq

        sums = dk[:, :, :num_keys], dv[:, :, :num_keys]
        sums, dq = _scan_blocks(add, sums, tuple(x[blocks] for x in inputs))
        dk, dv = (total.at[:, :, :num_keys].set(part) for total, part in zip((dk, dv), sums))
        dqs.append(dq)
    dq = _merge_blocks(jnp.concatenate(dqs), length).astype(q.dtype)
    return dq, dk.astype(k.dtype), dv.astype(v.dtype), None


attend.defvjp(_forward, _backward)


def _block_forward(k, v, key_mask, scale: float, q, query_index, query_enter):
    """Output and log-sum-exp of one block of queries."""
    scores = _scores(q, k, scale)
    visible = dense_mask(AttentionMask(query_index, query_enter, *key_mask))[:, None, None]
    # The lowest finite number instead of -inf keeps the output of a query without visible keys finite.
    scores = jnp.where(visible, scores, jnp.finfo(scores.dtype).min)
    maximum = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - maximum)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    out = jnp.einsum("bgrqk,bgkd->bgrqd", weights.astype(v.dtype), v, preferred_element_type=scores.dtype)
    return (out / total).astype(v.dtype), maximum + jnp.log(total)


def _block_backward(k, v, key_mask, scale: float, q, cotangent, delta, lse, query_index, query_enter):
    """Gradients of one block's queries, and this block's contribution to those of the keys and values."""
    visible = dense_mask(AttentionMask(query_index, query_enter, *key_mask))[:, None, None]
    weights = jnp.where(visible, jnp.exp(_scores(q, k, scale) - lse), 0)
    einsum = functools.partial(jnp.einsum, preferred_element_type=weights.dtype)
    dv = einsum("bgrqk,bgrqd->bgkd", weights.astype(v.dtype), cotangent)
    dscores = weights * (einsum("bgrqd,bgkd->bgrqk", cotangent, v) - delta) * scale
    dscores = dscores.astype(q.dtype)
    return einsum("bgrqk,bgkd->bgrqd", dscores, k), einsum("bgrqk,bgrqd->bgkd", dscores, q), dv


def _scores(q, k, scale: float):
    wide = jnp.promote_types(q.dtype, jnp.float32)
    return jnp.einsum("bgrqd,bgkd->bgrqk", q, k, preferred_element_type=wide) * scale


def _block_size(length: int) -> int:
    """Queries per block: the fewest equal blocks of at most `BLOCK` queries."""
    return -(-length // max(-(-length // BLOCK), 1))


def _levels(num_blocks: int, size: int, num_keys: int, aligned: bool) -> Iterator[tuple[slice, int]]:
    """(blocks of one level, number of keys that they are scored against)."""
    levels = min(num_blocks, LEVELS) if aligned else 1
    for level in range(levels):
        blocks = slice(level * num_blocks // levels, (level + 1) * num_blocks // levels)
        yield blocks, min(blocks.stop * size, num_keys) if aligned else num_keys


def _split_blocks(x, size: int):
    """`[rows, kv_heads, group, queries, d] -> [blocks, rows, kv_heads, group, size, d]`, padded with zeros."""
    x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, -x.shape[3] % size), (0, 0)))
    return jnp.moveaxis(x.reshape(*x.shape[:3], -1, size, x.shape[-1]), 3, 0)


def _merge_blocks(blocks, length: int):
    """The inverse of `_split_blocks`."""
    x = jnp.moveaxis(blocks, 0, 3)
    return x.reshape(*x.shape[:3], -1, x.shape[-1])[:, :, :, :length]


def _query_mask_blocks(mask: AttentionMask, size: int):
    """`query_index` and `query_enter` as `[blocks, #rows, size]`; padding queries see no key."""
    padded = (jnp.pad(field, ((0, 0), (0, -field.shape[1] % size)), constant_values=-1) for field in mask[:2])
    return tuple(jnp.moveaxis(field.reshape(len(field), -1, size), 1, 0) for field in padded)


def _key_mask(mask: AttentionMask, num_keys: int):
    return tuple(field[:, :num_keys] for field in mask[2:5])


def _map_blocks(block: Callable, inputs):
    """`lax.map` of `block` over stacked inputs, without a loop around a single block."""
    _, outputs = _scan_blocks(lambda carry, block_inputs: (carry, block(*block_inputs)), (), inputs)
    return outputs


def _scan_blocks(step: Callable, carry, inputs):
    """`lax.scan`, without a loop around a single block."""
    if len(inputs[0]) > 1:
        return jax.lax.scan(step, carry, inputs)
    carry, outputs = step(carry, jax.tree.map(lambda x: x[0], inputs))
    return carry, jax.tree.map(lambda x: x[None], outputs)
