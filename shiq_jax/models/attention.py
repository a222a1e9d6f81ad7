"""The one seam through which every layer attends: training on packed rows and decoding with a cache alike."""

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

NEVER = np.iinfo(np.int32).max  # as `key_enter`: a key that no query sees
_BLOCK = 128  # queries; a block's scores over some thousand keys fit into a CPU core's cache


class Visibility(NamedTuple):
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


def forest(intervals: Int[Array, "rows length 2"] | None, length: int) -> Visibility:
    """The visibility of packed rows; plain causal attention over the row when `intervals` is None."""
    index = jnp.arange(length, dtype=jnp.int32)[None]
    if intervals is None:
        zeros = jnp.zeros_like(index)
        return Visibility(index, zeros, index, zeros, zeros + 1, aligned=True)
    enter, exit_ = intervals[..., 0], intervals[..., 1]
    return Visibility(index, enter, index, enter, exit_, aligned=True)


def cached(
    enter: Int[Array, "rows slots"],
    exit: Int[Array, "rows slots"],
    query_enter: Int[Array, "rows queries"],
    start: Int[Array, ""] | int,
) -> Visibility:
    """The visibility of tokens at cache slots start, start + 1, ... over all slots up to their own."""
    slots = jnp.arange(enter.shape[-1], dtype=jnp.int32)[None]
    own = jnp.arange(query_enter.shape[-1], dtype=jnp.int32)[None] + start
    return Visibility(own, query_enter, slots, enter, exit, aligned=isinstance(start, int) and start == 0)


def visible(visibility: Visibility) -> Bool[Array, "rows queries keys"]:
    """The rule of `Visibility` spelled out as a mask."""
    query_index, query_enter = visibility.query_index[..., :, None], visibility.query_enter[..., :, None]
    key_index, key_enter, key_exit = (keys[..., None, :] for keys in visibility[2:5])
    return (key_index <= query_index) & (key_enter <= query_enter) & (query_enter < key_exit)


def attention(
    q: Float[Array, "rows queries heads head_dim"],
    k: Float[Array, "rows keys kv_heads head_dim"],
    v: Float[Array, "rows keys kv_heads head_dim"],
    visibility: Visibility,
    *,
    scale: float,
    engine: str = "xla",
) -> Float[Array, "rows queries heads head_dim"]:
    """softmax(scale * q k^T) v over the visible keys, the softmax in float32; the result has the dtype of `v`.

    Query head h reads key-value head `h // (heads / kv_heads)`; keys are not repeated in memory. The result of a query
    that sees no key is finite and means nothing. engine: one of `ENGINES`. Raises ValueError for any other.
    """
    if engine not in ENGINES:
        raise ValueError(f"attention engine {engine!r} is unknown; the engines are {', '.join(ENGINES)}")
    return ENGINES[engine](q, k, v, visibility, scale)


def _xla(q, k, v, visibility: Visibility, scale: float):
    """Query blocks one after the other, each against the keys that it can see at all.

    That halves the work of causal rows and keeps the scores in cache; what a block computed is recomputed in the
    backward pass, so that memory grows with the row's length and not with its square. Heads come first, for a batched
    product of contiguous matrices is what backends are fast at.
    """
    rows, length, heads, head_dim = q.shape
    groups = k.shape[2]
    q = q.reshape(rows, length, groups, heads // groups, head_dim).transpose(0, 2, 3, 1, 4)
    k, v = (each.transpose(0, 2, 1, 3) for each in (k, v))
    mixed = []
    for start in range(0, length, _BLOCK):
        queries = slice(start, min(start + _BLOCK, length))
        keys = slice(0, queries.stop if visibility.aligned else k.shape[2])
        part = Visibility(*(each[:, queries] for each in visibility[:2]), *(each[:, keys] for each in visibility[2:5]))
        block = functools.partial(_block, visibility=part, scale=scale)
        block = jax.checkpoint(block) if length > _BLOCK else block
        mixed.append(block(q[:, :, :, queries], k[:, :, keys], v[:, :, keys]))
    return jnp.concatenate(mixed, axis=3).transpose(0, 3, 1, 2, 4).reshape(rows, length, heads, head_dim)


def _block(q, k, v, visibility: Visibility, scale: float):
    """`q` [rows, groups, heads of a group, queries, head_dim], `k` and `v` [rows, groups, keys, head_dim]."""
    precise = jnp.promote_types(q.dtype, jnp.float32)
    scores = jnp.einsum("bgrqd,bgkd->bgrqk", q, k, preferred_element_type=precise) * scale
    # The most negative finite number, not -inf: a query that sees nothing then has a finite value and gradient.
    scores = jnp.where(visible(visibility)[:, None, None], scores, jnp.finfo(precise).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bgrqk,bgkd->bgrqd", weights, v)


def branching(
    q: Float[Array, "rows branches heads head_dim"],
    trunk: tuple[Float[Array, "rows kv_heads head_dim keys"], Float[Array, "rows kv_heads keys head_dim"]],
    seen: Bool[Array, "rows keys"],
    own: tuple[
        Float[Array, "rows branches kv_heads head_dim slots"], Float[Array, "rows branches kv_heads slots head_dim"]
    ],
    own_seen: Bool[Array, "rows branches slots"],
    *,
    scale: float,
) -> Float[Array, "rows branches heads head_dim"]:
    """One query of each of several sequences that continue their row: over the row's keys, which are read once for
    all of them, and over the sequence's own. Exactly `attention` over both together; for decoding, forward only.
    """
    rows, branches, heads, head_dim = q.shape
    groups = trunk[0].shape[1]
    together = heads // groups
    precise = jnp.promote_types(q.dtype, jnp.float32)
    q = q.reshape(rows, branches, groups, together, head_dim)

    # Products of [batch, few, many] and no other layout: that is what backends have a fast path for.
    def by_row(x):
        return x.swapaxes(1, 2).reshape(rows * groups, branches * together, -1)

    def by_branch(x):
        return x.reshape(rows, groups, branches, together, -1).swapaxes(1, 2)

    def product(a, b):
        return jnp.matmul(a, b.reshape(len(a), *b.shape[-2:]), preferred_element_type=precise)

    shared = product(by_row(q), trunk[0]) * scale
    alone = product(q.reshape(-1, together, head_dim), own[0]) * scale
    lowest = jnp.finfo(precise).min
    shared = jnp.where(jnp.repeat(seen, groups, axis=0)[:, None], shared, lowest)
    alone = jnp.where(jnp.repeat(own_seen.reshape(rows * branches, -1), groups, axis=0)[:, None], alone, lowest)
    # Two parts of one softmax; each stays in the order of its product, and only the sums are turned.
    top = by_branch(jnp.max(shared, axis=-1, keepdims=True))
    top = jnp.maximum(top, jnp.max(alone, axis=-1, keepdims=True).reshape(top.shape))
    shared = jnp.exp(shared - by_row(top))
    alone = jnp.exp(alone - top.reshape(-1, together, 1))
    total = by_branch(jnp.sum(shared, axis=-1, keepdims=True))
    total += jnp.sum(alone, axis=-1, keepdims=True).reshape(total.shape)
    mixed = by_branch(product(shared.astype(q.dtype), trunk[1]))
    mixed += product(alone.astype(q.dtype), own[1]).reshape(mixed.shape)
    return (mixed / total).astype(q.dtype).reshape(rows, branches, heads, head_dim)


ENGINES: Mapping[str, Callable] = {"xla": _xla}
