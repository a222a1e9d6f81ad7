"""Token statistics: everything that a loss needs to know of the logits, without ever holding the logits.

A vocabulary of 128k at 8k tokens is 4 GiB of fp32 logits, and as much again for their gradient. Here a chunk of
rows is projected, reduced to its statistics and dropped; the backward pass projects it once more. The work is 2DV per
row forward and 6DV backward, one projection more than storing the logits would cost.

On a mesh, leading axes are flattened and chunked, so `token_stats` belongs inside `jax.shard_map`, where all rows are
local. With `axis_name`, `unembedding` and `bias` are this device's equal slice of the vocabulary, slice i holding
columns [i V, (i + 1) V), while hidden and tokens are the same all along that axis; so are the returned statistics.
The collectives are a few of size [rows], none of them inside the loop over chunks. Gradients taken through
`shard_map`, or inside it with `check_vma=True`, are those of the unsharded computation: jax sums the gradient of an
argument that is replicated over a mesh axis over that axis, so the caller sums nothing. The unembedding's is summed
over the axis of the rows once, after the loop, and by a reduce-scatter when the caller gathered it over that axis
inside. Inside `shard_map` with `check_vma=False`, `jax.grad` means the sum of all devices' losses, here as everywhere
in jax.
"""

from functools import partial
from numbers import Real
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from shiq_jax.objectives.types import TokenStats
from shiq_jax.objectives.validation import as_float32, check_positive

# 2^26 logits are 256 MiB in fp32, and 512 rows of a vocabulary of 128k. The backward pass reads and writes the [D, V]
# gradient once per chunk: 6DV flops per row against some 12DV bytes per chunk need about 400 rows before arithmetic and
# not memory bounds the loop on accelerators that do 200 flops in the time of one byte.
CHUNK_BUDGET = 2**26

# A column that does not exist. Finite, because a shard may hold nothing else: exp(z - lse) must then be a number.
_ABSENT = -1e30


class _Head(NamedTuple):
    """The static part of a projection to logits, and how many rows are projected at once."""

    chunk: int
    scale: float | None
    softcap: float | None
    with_lse2: bool


def token_stats(
    hidden: Float[Array, "... D"],
    unembedding: Float[Array, "D V"],
    tokens: Int[Array, "..."],
    *,
    chunk_size: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    bias: Float[Array, " V"] | None = None,
    vocab_size: int | None = None,
    axis_name: str | tuple[str, ...] | None = None,
    extra: tuple[str, ...] = (),
) -> TokenStats:
    """Log-probability and log-sum-exp of the tokens that hidden states predict, in memory O(chunk * V).

    logits = hidden @ unembedding * scale + bias, then softcap * tanh(logits / softcap); columns from `vocab_size` on
    count as -inf. Differentiable in reverse mode with respect to hidden, unembedding and bias.

    The product runs in the dtype of `hidden` and accumulates in fp32 (fp64 for fp64), as does the gradient of the
    unembedding over all chunks. A master unembedding in fp32 may therefore be passed beside bf16 hidden states: it is
    rounded for the product, its gradient is not. All statistics are fp32 (fp64 for fp64).

    Leading axes belong to this function: give it the whole batch. Under `jax.vmap` the gradient of a shared
    unembedding would be formed once per example before it is summed.

    On a mesh call it inside `jax.shard_map`, where all rows are local, and give `axis_name` when the vocabulary is
    sharded: the module's docstring says what each device holds and what it gets.

    Args:
      hidden: [..., D], the hidden state that predicts each token.
      unembedding: [D, V].
      tokens: [...], ids in [0, vocab_size), counted over all slices; other ids are the caller's error and give numbers
        without meaning.
      chunk_size: the most rows to project at once; by default what keeps chunk * V within 2^26 logits.
      softcap, scale: constants of the architecture, Python numbers, or None for none.
      bias: [V] or None.
      vocab_size: how many columns, over all slices, are tokens; None for all of them.
      axis_name: the mesh axis over which the vocabulary is sharded, or None.
      extra: ("lse2",) fills `lse2`.

    Returns:
      TokenStats with fields [...].

    Raises:
      ValueError: for shapes that disagree and options out of range.
    """
    hidden, unembedding, tokens = map(jnp.asarray, (hidden, unembedding, tokens))
    _check(hidden, unembedding, tokens, bias, chunk_size, softcap, scale, extra)
    depth, columns = unembedding.shape
    slices = 1 if axis_name is None else lax.axis_size(axis_name)
    if vocab_size is not None and not 0 < vocab_size <= columns * slices:
        raise ValueError(f"vocab_size is {vocab_size} but the unembedding has {columns * slices} columns.")

    offset = 0 if axis_name is None else lax.axis_index(axis_name) * columns
    limit = None if vocab_size in (None, columns * slices) else jnp.asarray(vocab_size - offset, jnp.int32)
    head = _Head(_rows_per_chunk(tokens.size, columns, chunk_size), scale, softcap, "lse2" in extra)
    arguments = (hidden.reshape(-1, depth), unembedding, bias, tokens.reshape(-1).astype(jnp.int32) - offset, limit)
    picked, lse, lse2 = _local_stats(head, *_alike(arguments))

    # Only the statistics of a slice have a hand-written derivative: how slices combine is left to jax, so that the
    # transposed collectives are right under either replication rule of shard_map.
    if axis_name is not None:
        picked = lax.psum(picked, axis_name)
        lse = _logsumexp_over(lse, axis_name)
        lse2 = None if lse2 is None else _logsumexp_over(lse2, axis_name)
    shaped = (None if x is None else x.reshape(tokens.shape) for x in (picked - lse, lse, lse2))
    return TokenStats(*shaped)


def token_stats_from_logits(logits: Float[Array, "... V"], tokens: Int[Array, "..."]) -> TokenStats:
    """Log-probability and log-sum-exp of tokens under raw logits that the caller already holds.

    Args:
      logits: [..., V] raw logits, not log-probabilities; reduced in fp32 whatever their dtype (fp64 for fp64).
      tokens: [...] ids in [0, V).

    Returns:
      TokenStats with fields [...]; lse2 is None.

    Raises:
      ValueError: when the leading shapes disagree.
    """
    logits, tokens = jnp.asarray(logits), jnp.asarray(tokens)
    if logits.shape[:-1] != tokens.shape:
        raise ValueError(f"logits have shape {logits.shape} but tokens {tokens.shape}; expected [..., V] and [...].")
    logits = as_float32(logits)
    lse = jax.nn.logsumexp(logits, axis=-1)
    picked = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    return TokenStats(picked - lse, lse)


def _check(hidden, unembedding, tokens, bias, chunk_size, softcap, scale, extra) -> None:
    if unembedding.ndim != 2 or hidden.shape[-1:] != unembedding.shape[:1]:
        raise ValueError(f"hidden has shape {hidden.shape} but unembedding {unembedding.shape}; give [..., D], [D, V].")
    if tokens.shape != hidden.shape[:-1]:
        raise ValueError(f"tokens have shape {tokens.shape} but hidden {hidden.shape}; give [...] and [..., D].")
    if bias is not None and bias.shape != unembedding.shape[1:]:
        raise ValueError(f"bias has shape {bias.shape} but unembedding {unembedding.shape}; give [V] and [D, V].")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size} but must be at least 1 row.")
    for name, constant in (("softcap", softcap), ("scale", scale)):
        if constant is not None:
            if not isinstance(constant, Real):
                raise ValueError(f"{name} is a {type(constant).__name__} but must be a Python number, not an array.")
            check_positive(name, constant)
    for name in extra:
        if name != "lse2":
            raise ValueError(f"extra names {name!r} but the only further statistic is 'lse2'.")


def _rows_per_chunk(rows: int, columns: int, chunk_size: int | None) -> int:
    """Rows of equal chunks, as few chunks as the bound allows, so that padding stays below one row per chunk."""
    bound = chunk_size or max(1, CHUNK_BUDGET // columns)
    chunks = max(1, -(-rows // bound))
    return max(1, -(-rows // chunks))


def _alike(arguments: Any) -> Any:
    """Marks all arguments as varying over the mesh axes over which any of them varies.

    Inside shard_map a hand-written derivative must return cotangents that vary as its arguments do. Transposing this
    marking is the sum over devices that the cotangent of a replicated argument needs.
    """

    def varying(x):
        return jax.typeof(x).manual_axis_type.varying

    axes = frozenset().union(*map(varying, jax.tree.leaves(arguments)))

    def vary(x):
        missing = tuple(axes - varying(x))
        return lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(vary, arguments)


def _logsumexp_over(lse: Float[Array, " N"], axis_name) -> Float[Array, " N"]:
    """log of the sum over devices of exp(lse)."""
    top = lax.pmax(lax.stop_gradient(lse), axis_name)
    return top + jnp.log(lax.psum(jnp.exp(lse - top), axis_name))


def _accumulate(a: Array, b: Array, contract: tuple[int, int]) -> Array:
    """The product of two matrices over the given axes, accumulated and returned in fp32 or wider."""
    wide = jnp.promote_types(a.dtype, jnp.float32)
    return lax.dot_general(a, b, (((contract[0],), (contract[1],)), ((), ())), preferred_element_type=wide)


def _logits(head: _Head, hidden, unembedding, bias, limit):
    """Logits [C, V] of one chunk, and which columns exist (None when all do)."""
    logits = _accumulate(hidden, unembedding, (1, 0))
    if head.scale is not None:
        logits = logits * head.scale
    if bias is not None:
        logits = logits + bias.astype(logits.dtype)
    if head.softcap is not None:
        logits = head.softcap * jnp.tanh(logits / head.softcap)
    exists = None if limit is None else (jnp.arange(unembedding.shape[1]) < limit)[None, :]
    return logits if exists is None else jnp.where(exists, logits, _ABSENT), exists


def _chunks(head: _Head, x: Array) -> Array:
    """[N, ...] as [chunks, C, ...], the last chunk padded with zeros."""
    chunks = max(1, -(-x.shape[0] // head.chunk))
    padding = [(0, chunks * head.chunk - x.shape[0])] + [(0, 0)] * (x.ndim - 1)
    return jnp.pad(x, padding).reshape(chunks, head.chunk, *x.shape[1:])


def _rows(chunked: Array, count: int) -> Array:
    """The inverse of `_chunks`."""
    return chunked.reshape(-1, *chunked.shape[2:])[:count]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _local_stats(head: _Head, hidden, unembedding, bias, tokens, limit):
    """(logit of the token or 0 when it is another slice's, lse, lse2 or None) of hidden [N, D] over local columns."""
    return _local_stats_fwd(head, hidden, unembedding, bias, tokens, limit)[0]


def _local_stats_fwd(head: _Head, hidden, unembedding, bias, tokens, limit):
    weight = unembedding.astype(hidden.dtype)

    def chunk_stats(_, chunk):
        rows, ids = chunk
        logits, _ = _logits(head, rows, weight, bias, limit)
        mine = (ids >= 0) & (ids < logits.shape[1])
        at = jnp.where(mine, ids, 0)[:, None]
        picked = jnp.where(mine, jnp.take_along_axis(logits, at, axis=1)[:, 0], 0)
        top = jnp.max(logits, axis=1)
        shifted = logits - top[:, None]
        lse = top + jnp.log(jnp.sum(jnp.exp(shifted), axis=1))
        lse2 = 2 * top + jnp.log(jnp.sum(jnp.exp(2 * shifted), axis=1)) if head.with_lse2 else None
        return None, (picked, lse, lse2)

    _, stats = lax.scan(chunk_stats, None, (_chunks(head, hidden), _chunks(head, tokens)))
    stats = jax.tree.map(lambda x: _rows(x, hidden.shape[0]), stats)
    return stats, (hidden, unembedding, bias, tokens, limit, stats[1], stats[2])


def _local_stats_bwd(head: _Head, saved, cotangents):
    hidden, unembedding, bias, tokens, limit, lse, lse2 = saved
    weight = unembedding.astype(hidden.dtype)
    wide = lse.dtype

    def chunk_gradients(sums, chunk):
        rows, ids, (lse, lse2), (d_picked, d_lse, d_lse2) = chunk
        logits, exists = _logits(head, rows, weight, bias, limit)
        slope = jnp.exp(logits - lse[:, None]) * d_lse[:, None]
        if head.with_lse2:
            slope += 2 * jnp.exp(2 * logits - lse2[:, None]) * d_lse2[:, None]
        slope += jnp.where(jnp.arange(logits.shape[1]) == ids[:, None], d_picked[:, None], 0)
        if head.softcap is not None:
            slope *= 1 - (logits / head.softcap) ** 2
        if exists is not None:
            slope = jnp.where(exists, slope, 0)
        d_unembedding, d_bias = sums
        d_bias = None if bias is None else d_bias + jnp.sum(slope, axis=0)
        if head.scale is not None:
            slope = slope * head.scale
        slope = slope.astype(rows.dtype)
        d_rows = _accumulate(slope, weight, (1, 1)).astype(rows.dtype)
        return (d_unembedding + _accumulate(rows, slope, (0, 0)), d_bias), d_rows

    zeros = (jnp.zeros(unembedding.shape, wide), None if bias is None else jnp.zeros(bias.shape, wide))
    scanned = jax.tree.map(lambda x: _chunks(head, x), (hidden, tokens, (lse, lse2), cotangents))
    zeros = _alike((zeros, scanned))[0]
    (d_unembedding, d_bias), d_hidden = lax.scan(chunk_gradients, zeros, scanned)
    d_bias = None if bias is None else d_bias.astype(bias.dtype)
    return _rows(d_hidden, hidden.shape[0]), d_unembedding.astype(unembedding.dtype), d_bias, None, None


_local_stats.defvjp(_local_stats_fwd, _local_stats_bwd)
