"""Token statistics of logits, computed in chunks without materializing the logits.

With a vocabulary of 128k, 8k tokens have 4 GiB of float32 logits and a gradient of the same size. This module projects
a chunk of rows, reduces it to statistics and discards it; the backward pass recomputes the projection. The cost is 2DV
flops per row forward and 6DV backward, one projection more than with stored logits.

On a mesh, call `token_stats` inside `jax.shard_map`, where all rows are local, because it flattens and chunks the
leading axes. With `axis_name`, each device holds an equal slice of the vocabulary in `unembedding` and `bias`; slice i
holds columns [i V, (i + 1) V). hidden, tokens and the returned statistics are replicated over that axis. The
collectives have size [rows] and run outside the loop over chunks.

Gradients taken through `shard_map`, or inside it with `check_vma=True`, equal those of the unsharded computation: jax
sums the gradient of a replicated argument over the mesh axis, so the caller must not. The gradient of the unembedding
is reduced once over the axis of the rows, after the loop; if the caller all-gathers the unembedding over that axis
inside `shard_map`, the reduction is a reduce-scatter. Inside `shard_map` with `check_vma=False`, `jax.grad`
differentiates the sum of the losses of all devices, as usual in jax.
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

# 2^26 float32 logits are 256 MiB, or 512 rows with a vocabulary of 128k. The backward pass reads and writes the [D, V]
# gradient once per chunk, about 12DV bytes for 6DV flops per row, so about 400 rows make it compute-bound on
# accelerators with 200 flops per byte.
CHUNK_BUDGET = 2**26

# Logit of padding columns. Finite, because exp(z - lse) would be NaN on a shard with padding only.
_PADDING_LOGIT = -1e30


class _Projection(NamedTuple):
    """Static options of the projection to logits, and the number of rows per chunk."""

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
    """Log-probability and log-sum-exp of the tokens predicted by hidden states, in O(chunk * V) memory.

    logits = hidden @ unembedding * scale + bias, then softcap * tanh(logits / softcap); columns from `vocab_size` on
    are treated as -inf. Supports reverse-mode differentiation with respect to hidden, unembedding and bias.

    The product runs in the dtype of `hidden` and accumulates in float32 (float64 for float64 inputs), as does the
    gradient of the unembedding over all chunks. A float32 unembedding can be combined with bfloat16 hidden states: it
    is rounded for the product, but its gradient is not. All statistics are float32 (float64 for float64 inputs).

    Pass the whole batch through the leading axes: `jax.vmap` would materialize the gradient of a shared unembedding
    once per example.

    On a mesh, call it inside `jax.shard_map`, and pass `axis_name` if the vocabulary is sharded; see the module
    docstring for the layout.

    Args:
      hidden: [..., D], the hidden state that predicts each token.
      unembedding: [D, V].
      tokens: [...], global ids in [0, vocab_size); not checked, results for other ids are undefined.
      chunk_size: maximum number of rows per projection; by default, chunk * V is at most 2^26 logits.
      softcap, scale: Python numbers of the architecture, or None.
      bias: [V] or None.
      vocab_size: global number of columns that are tokens; None for all columns.
      axis_name: mesh axis over which the vocabulary is sharded, or None.
      extra: ("lse2",) fills `lse2`.

    Returns:
      TokenStats with fields [...].

    Raises:
      ValueError: for mismatched shapes and options out of range.
    """
    hidden, unembedding, tokens = map(jnp.asarray, (hidden, unembedding, tokens))
    _check(hidden, unembedding, tokens, bias, chunk_size, softcap, scale, extra)
    depth, columns = unembedding.shape
    slices = 1 if axis_name is None else lax.axis_size(axis_name)
    if vocab_size is not None and not 0 < vocab_size <= columns * slices:
        raise ValueError(f"vocab_size is {vocab_size} but the unembedding has {columns * slices} columns.")

    offset = 0 if axis_name is None else lax.axis_index(axis_name) * columns
    no_padding = vocab_size in (None, columns * slices)
    valid_columns = None if no_padding else jnp.asarray(vocab_size - offset, jnp.int32)
    projection = _Projection(_rows_per_chunk(tokens.size, columns, chunk_size), scale, softcap, "lse2" in extra)
    local_tokens = tokens.reshape(-1).astype(jnp.int32) - offset
    arguments = (hidden.reshape(-1, depth), unembedding, bias, local_tokens, valid_columns)
    token_logits, lse, lse2 = _local_stats(projection, *_mark_varying(arguments))

    # The custom VJP covers only the statistics of a slice; jax transposes the collectives, so that they are correct for
    # either value of check_vma.
    if axis_name is not None:
        token_logits = lax.psum(token_logits, axis_name)
        lse = _logsumexp_over(lse, axis_name)
        lse2 = None if lse2 is None else _logsumexp_over(lse2, axis_name)
    stats = (token_logits - lse, lse, lse2)
    return TokenStats(*(None if x is None else x.reshape(tokens.shape) for x in stats))


def token_stats_from_logits(logits: Float[Array, "... V"], tokens: Int[Array, "..."]) -> TokenStats:
    """Log-probability and log-sum-exp of tokens, from materialized raw logits.

    Args:
      logits: [..., V] raw logits, not log-probabilities; reduced in float32 (float64 for float64 inputs).
      tokens: [...] ids in [0, V).

    Returns:
      TokenStats with fields [...]; lse2 is None.

    Raises:
      ValueError: if the leading shapes differ.
    """
    logits, tokens = jnp.asarray(logits), jnp.asarray(tokens)
    if logits.shape[:-1] != tokens.shape:
        raise ValueError(f"logits have shape {logits.shape} but tokens {tokens.shape}; expected [..., V] and [...].")
    logits = as_float32(logits)
    lse = jax.nn.logsumexp(logits, axis=-1)
    token_logits = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    return TokenStats(token_logits - lse, lse)


def _check(hidden, unembedding, tokens, bias, chunk_size, softcap, scale, extra) -> None:
    if unembedding.ndim != 2 or hidden.shape[-1:] != unembedding.shape[:1]:
        raise ValueError(
            f"hidden has shape {hidden.shape} but unembedding {unembedding.shape}; expected [..., D], [D, V]."
        )
    if tokens.shape != hidden.shape[:-1]:
        raise ValueError(f"tokens have shape {tokens.shape} but hidden {hidden.shape}; expected [...] and [..., D].")
    if bias is not None and bias.shape != unembedding.shape[1:]:
        raise ValueError(f"bias has shape {bias.shape} but unembedding {unembedding.shape}; expected [V] and [D, V].")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size} but must be at least 1 row.")
    for name, constant in (("softcap", softcap), ("scale", scale)):
        if constant is not None:
            if not isinstance(constant, Real):
                raise ValueError(f"{name} is a {type(constant).__name__} but must be a Python number, not an array.")
            check_positive(name, constant)
    for name in extra:
        if name != "lse2":
            raise ValueError(f"extra contains {name!r} but the only extra statistic is 'lse2'.")


def _rows_per_chunk(rows: int, columns: int, chunk_size: int | None) -> int:
    """Size of equal chunks, as few as the bound allows, so that padding stays below one row per chunk."""
    max_rows = chunk_size or max(1, CHUNK_BUDGET // columns)
    chunks = max(1, -(-rows // max_rows))
    return max(1, -(-rows // chunks))


def _mark_varying(arguments: Any) -> Any:
    """Mark all arguments as varying over the mesh axes over which any of them varies.

    Inside shard_map, the cotangents of a custom VJP must vary over the same axes as its arguments. The transpose of the
    cast is the sum over devices that the cotangent of a replicated argument requires.
    """

    def varying_axes(x):
        return jax.typeof(x).manual_axis_type.varying

    axes = frozenset().union(*map(varying_axes, jax.tree.leaves(arguments)))

    def cast(x):
        missing = tuple(axes - varying_axes(x))
        return lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(cast, arguments)


def _logsumexp_over(lse: Float[Array, " N"], axis_name) -> Float[Array, " N"]:
    """log of the sum over devices of exp(lse)."""
    max_lse = lax.pmax(lax.stop_gradient(lse), axis_name)
    return max_lse + jnp.log(lax.psum(jnp.exp(lse - max_lse), axis_name))


def _matmul(a: Array, b: Array, contract: tuple[int, int]) -> Array:
    """Product of two matrices over the given axes, accumulated and returned in at least float32."""
    accumulator_dtype = jnp.promote_types(a.dtype, jnp.float32)
    dimension_numbers = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, dimension_numbers, preferred_element_type=accumulator_dtype)


def _logits(projection: _Projection, hidden, unembedding, bias, valid_columns):
    """Logits [C, V] of one chunk, and the mask of the columns that are tokens (None if all are)."""
    logits = _matmul(hidden, unembedding, (1, 0))
    if projection.scale is not None:
        logits = logits * projection.scale
    if bias is not None:
        logits = logits + bias.astype(logits.dtype)
    if projection.softcap is not None:
        logits = projection.softcap * jnp.tanh(logits / projection.softcap)
    is_token = None if valid_columns is None else (jnp.arange(unembedding.shape[1]) < valid_columns)[None, :]
    return logits if is_token is None else jnp.where(is_token, logits, _PADDING_LOGIT), is_token


def _chunks(projection: _Projection, x: Array) -> Array:
    """Reshape [N, ...] to [chunks, C, ...], padding the last chunk with zeros."""
    chunks = max(1, -(-x.shape[0] // projection.chunk))
    padding = [(0, chunks * projection.chunk - x.shape[0])] + [(0, 0)] * (x.ndim - 1)
    return jnp.pad(x, padding).reshape(chunks, projection.chunk, *x.shape[1:])


def _rows(chunked: Array, count: int) -> Array:
    """Inverse of `_chunks`."""
    return chunked.reshape(-1, *chunked.shape[2:])[:count]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _local_stats(projection: _Projection, hidden, unembedding, bias, tokens, valid_columns):
    """(token logits, 0 for tokens of other slices; lse; lse2 or None) of hidden [N, D] over the local columns."""
    return _local_stats_fwd(projection, hidden, unembedding, bias, tokens, valid_columns)[0]


def _local_stats_fwd(projection: _Projection, hidden, unembedding, bias, tokens, valid_columns):
    weight = unembedding.astype(hidden.dtype)

    def chunk_stats(_, chunk):
        rows, ids = chunk
        logits, _ = _logits(projection, rows, weight, bias, valid_columns)
        is_local = (ids >= 0) & (ids < logits.shape[1])
        local_ids = jnp.where(is_local, ids, 0)[:, None]
        token_logits = jnp.where(is_local, jnp.take_along_axis(logits, local_ids, axis=1)[:, 0], 0)
        max_logits = jnp.max(logits, axis=1)
        shifted = logits - max_logits[:, None]
        lse = max_logits + jnp.log(jnp.sum(jnp.exp(shifted), axis=1))
        lse2 = 2 * max_logits + jnp.log(jnp.sum(jnp.exp(2 * shifted), axis=1)) if projection.with_lse2 else None
        return None, (token_logits, lse, lse2)

    _, stats = lax.scan(chunk_stats, None, (_chunks(projection, hidden), _chunks(projection, tokens)))
    stats = jax.tree.map(lambda x: _rows(x, hidden.shape[0]), stats)
    return stats, (hidden, unembedding, bias, tokens, valid_columns, stats[1], stats[2])


def _local_stats_bwd(projection: _Projection, residuals, cotangents):
    hidden, unembedding, bias, tokens, valid_columns, lse, lse2 = residuals
    weight = unembedding.astype(hidden.dtype)
    accumulator_dtype = lse.dtype

    def chunk_gradients(carry, chunk):
        rows, ids, (lse, lse2), (d_token_logits, d_lse, d_lse2) = chunk
        logits, is_token = _logits(projection, rows, weight, bias, valid_columns)
        d_logits = jnp.exp(logits - lse[:, None]) * d_lse[:, None]
        if projection.with_lse2:
            d_logits += 2 * jnp.exp(2 * logits - lse2[:, None]) * d_lse2[:, None]
        d_logits += jnp.where(jnp.arange(logits.shape[1]) == ids[:, None], d_token_logits[:, None], 0)
        if projection.softcap is not None:
            d_logits *= 1 - (logits / projection.softcap) ** 2
        if is_token is not None:
            d_logits = jnp.where(is_token, d_logits, 0)
        d_unembedding, d_bias = carry
        d_bias = None if bias is None else d_bias + jnp.sum(d_logits, axis=0)
        if projection.scale is not None:
            d_logits = d_logits * projection.scale
        d_logits = d_logits.astype(rows.dtype)
        d_rows = _matmul(d_logits, weight, (1, 1)).astype(rows.dtype)
        return (d_unembedding + _matmul(rows, d_logits, (0, 0)), d_bias), d_rows

    d_bias = None if bias is None else jnp.zeros(bias.shape, accumulator_dtype)
    init = (jnp.zeros(unembedding.shape, accumulator_dtype), d_bias)
    scanned = jax.tree.map(lambda x: _chunks(projection, x), (hidden, tokens, (lse, lse2), cotangents))
    init = _mark_varying((init, scanned))[0]
    (d_unembedding, d_bias), d_hidden = lax.scan(chunk_gradients, init, scanned)
    d_bias = None if bias is None else d_bias.astype(bias.dtype)
    return _rows(d_hidden, hidden.shape[0]), d_unembedding.astype(unembedding.dtype), d_bias, None, None


_local_stats.defvjp(_local_stats_fwd, _local_stats_bwd)
