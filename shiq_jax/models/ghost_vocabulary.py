"""Tracked token lookup and tracked LM head, including the cross term of a tied embedding table.

The gradient of a tied table is the sum of the lookup's and the head's gradients, so its squared norm contains the cross
term 2 sum_t <e_t, h_t>: e_t is the cotangent of the embedding at position t, and h_t the row of the head's gradient
that belongs to the token at position t. `with_tie` creates two zero arrays whose cotangents are the e_t and the h_t.
Its backward pass runs after those of both uses, and computes the norm.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero
from jax.sharding import Mesh, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from shiq_jax.models.ghost_norms import (
    HEAD,
    LOOKUP,
    ROUNDING,
    NormTracker,
    Tie,
    conservative_square,
    finite_rows,
    instantiate,
    is_differentiated,
    keep_rows,
    norms,
    scale_rows,
    squared_norm_of_product,
    wide_einsum,
)
from shiq_jax.models.sharded_statistics import sharded_token_stats
from shiq_jax.objectives import TokenStats, token_stats
from shiq_jax.sharding import partition_spec

# Maximum number of logits that the head's backward pass computes at once.
BUDGET = 2**26


def with_tie(tracker: NormTracker, tokens: Int[Array, "rows length"], features: int, dtype: DTypeLike) -> NormTracker:
    """The tracker of a model with a tied table of `features` columns, for one pass that looks up `tokens`.

    dtype: of the arrays that connect the two uses.
    """
    return dataclasses.replace(tracker, tie=Tie(tokens, *_tie((features, dtype), tracker.squares, tokens)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _tie(features_and_dtype, squares, tokens):
    features, dtype = features_and_dtype
    zeros = jnp.zeros((*tokens.shape, features), dtype)
    return zeros, zeros


def _tie_forward(features_and_dtype, squares, tokens):
    return _tie(features_and_dtype, squares.value, tokens.value), (squares.value, tokens.value)


def _tie_backward(features_and_dtype, residuals, cotangents):
    squares, tokens = residuals
    if all(isinstance(cotangent, SymbolicZero) for cotangent in cotangents):
        return None, None
    embedding_grads, head_grads = map(instantiate, cotangents)
    square = _squared_norm_of_lookup(tokens, embedding_grads)
    # The cross term may be negative; its rounding margin is therefore relative to the product of the norms.
    square += 2 * jnp.sum(embedding_grads * head_grads, axis=(1, 2))
    square += 2 * ROUNDING * jnp.sum(norms(embedding_grads) * norms(head_grads), axis=1)
    return square.astype(squares.dtype), None


_tie.defvjp(_tie_forward, _tie_backward, symbolic_zeros=True)


def lookup(
    table: Float[Array, "vocab features"], tokens: Int[Array, "rows length"], tracker: NormTracker
) -> Float[Array, "rows length features"]:
    """Tracked embeddings of the tokens."""
    link = None if tracker.tie is None else tracker.tie.embedding_grads.astype(table.dtype)
    return _lookup(tracker.rule, table, tokens, tracker.squares, link)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _lookup(rule, table, tokens, squares, link):
    return checkpoint_name(table, LOOKUP)[tokens]


def _lookup_forward(rule, table, tokens, squares, link):
    tied = None if link is None else ()
    return table.value[tokens.value], (table.value, tokens.value, squares.value, tied, is_differentiated(table))


def _lookup_backward(rule, residuals, cotangent):
    table, tokens, squares, tied, differentiated = residuals
    if differentiated is None:
        return None, None, None, None
    cotangent = instantiate(cotangent)
    joint = tied is not None and _has_joint_norm(rule)
    square = None if joint else _squared_norm_of_lookup(tokens, cotangent).astype(squares.dtype)
    scaled = keep_rows(finite_rows(cotangent), cotangent)
    scaled = scale_rows(scaled, rule, square, squares, uses=1 if tied is None else 2)
    wide = jnp.promote_types(cotangent.dtype, jnp.float32)
    gradient = jnp.zeros(table.shape, wide).at[tokens].add(scaled.astype(wide))
    return gradient.astype(table.dtype), None, square, cotangent if joint else None


_lookup.defvjp(_lookup_forward, _lookup_backward, symbolic_zeros=True)


def _squared_norm_of_lookup(tokens: Int[Array, "rows length"], embedding_grads: Float[Array, "rows length features"]):
    """Squared norm of each row's gradient of the table, from the cotangents of its embeddings."""
    same_token = tokens[:, :, None] == tokens[:, None, :]
    gram = wide_einsum("btd,bud->btu", embedding_grads, embedding_grads)
    square = jnp.sum(jnp.where(same_token, gram, 0), axis=(1, 2))
    return conservative_square(square, jnp.sum(norms(embedding_grads), axis=1))


def _has_joint_norm(rule: Callable | str | None) -> bool:
    """Whether both uses of a tied table share one norm; not so if each operation clips its own gradient."""
    return not callable(rule)


def tracked_token_stats(
    hidden: Float[Array, "rows A features"],
    unembedding: Float[Array, "features vocab"],
    tokens: Int[Array, "rows A"],
    tracker: NormTracker,
    mesh: Mesh | None = None,
) -> TokenStats:
    """`objectives.token_stats` of tokens predicted from hidden states, with tracked gradient norms."""
    link = None if tracker.tie is None else (tracker.tie.tokens, tracker.tie.head_grads.astype(hidden.dtype))
    return _token_stats(tracker.rule, mesh, hidden, unembedding, tokens, tracker.squares, link)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _token_stats(rule, mesh, hidden, unembedding, tokens, squares, link):
    return _untracked(mesh, hidden, checkpoint_name(unembedding, HEAD), tokens)


def _untracked(mesh, hidden, unembedding, tokens):
    if mesh is None:
        return token_stats(hidden, unembedding, tokens)
    return sharded_token_stats(hidden, unembedding, tokens, mesh=mesh)


def _token_stats_forward(rule, mesh, hidden, unembedding, tokens, squares, link):
    differentiated = is_differentiated(unembedding)
    looked_up = None if link is None else link[0].value
    hidden, unembedding, tokens, squares = hidden.value, unembedding.value, tokens.value, squares.value
    stats = _untracked(mesh, hidden, unembedding, tokens)
    return stats, (hidden, unembedding, tokens, squares, looked_up, stats.lse, differentiated)


def _token_stats_backward(rule, mesh, residuals, cotangents):
    hidden, unembedding, tokens, squares, looked_up, lse, differentiated = residuals
    logp_grad, lse_grad = instantiate(cotangents.logp), instantiate(cotangents.lse)
    # Rows with non-finite values are excluded from all sums and get a NaN norm.
    finite = finite_rows(hidden, logp_grad, lse_grad, lse)
    hidden, logp_grad, lse_grad, lse = (keep_rows(finite, x) for x in (hidden, logp_grad, lse_grad, lse))
    head = _Head(hidden, unembedding.astype(hidden.dtype), tokens, lse, logp_grad, lse_grad - logp_grad)
    if differentiated is None:
        return _sharded_gradients(mesh, head, with_norms=False, with_weights=False)[0], None, None, None, None
    hidden_grad, square, weight_grad = _sharded_gradients(mesh, head, with_weights=rule is None)
    square = jnp.where(finite, square, jnp.nan)
    if rule is not None:
        uses = 1 if looked_up is None else 2

        # Recompute the logit gradients instead of saving them: they have rows x vocabulary elements.
        @jax.checkpoint
        def scaled_weight_grad(head, square, precomputed):
            target_grad, softmax_grad = (
                scale_rows(x, rule, square, precomputed, uses) for x in (head.target_grad, head.softmax_grad)
            )
            scaled = head._replace(target_grad=target_grad, softmax_grad=softmax_grad)
            return _sharded_gradients(mesh, scaled, with_norms=False)[2]

        weight_grad = scaled_weight_grad(head, square, squares)
    link = (None, head.token_gradients(looked_up)) if looked_up is not None and _has_joint_norm(rule) else None
    return hidden_grad, weight_grad.astype(unembedding.dtype), None, square.astype(squares.dtype), link


_token_stats.defvjp(_token_stats_forward, _token_stats_backward, symbolic_zeros=True)


class _Head(NamedTuple):
    """Inputs of the head's backward pass.

    The gradient of the loss by the logits is `target_grad * onehot(token) + softmax_grad * softmax(logits)`.
    """

    hidden: Float[Array, "rows A features"]
    unembedding: Float[Array, "features vocab"]
    tokens: Int[Array, "rows A"]
    lse: Float[Array, "rows A"]
    target_grad: Float[Array, "rows A"]
    softmax_grad: Float[Array, "rows A"]

    def gradients(self, with_norms: bool = True, with_weights: bool = True, first_id: int | Int[Array, ""] = 0):
        """(gradient of hidden, squared norm of each row's gradient of the matrix, gradient of the matrix).

        The vocabulary is processed in chunks of at most `BUDGET` logits. first_id: token id of the first
        column. Results that are not requested are None.
        """
        num_ids, positions = self.unembedding.shape[1], self.tokens.size
        chunks = -(-num_ids * positions // BUDGET)
        size = -(-num_ids // chunks)
        wide = self.lse.dtype

        def add(sums, chunk):
            # The last chunk starts earlier to have the same size; columns of the previous chunk are masked.
            start = jnp.minimum(chunk * size, num_ids - size)
            columns = jax.lax.dynamic_slice_in_dim(self.unembedding, start, size, axis=1)
            ids = start + jnp.arange(size)
            global_ids = first_id + ids
            logit_grads = self._logit_gradients(wide_einsum("bad,dv->bav", self.hidden, columns), global_ids)
            logit_grads = jnp.where(ids >= chunk * size, logit_grads, 0).astype(self.hidden.dtype)
            hidden_grad, square, logit_grad_square, weight_grad = sums
            hidden_grad = hidden_grad + wide_einsum("bav,dv->bad", logit_grads, columns)
            if with_norms:
                square = square + squared_norm_of_product(self.hidden, logit_grads)
                logit_grad_square = logit_grad_square + jnp.square(norms(logit_grads))
            if with_weights:
                offset = (jnp.zeros_like(start), start)
                previous = jax.lax.dynamic_slice(weight_grad, offset, columns.shape)
                chunk_grad = wide_einsum("bad,bav->dv", self.hidden, logit_grads)
                weight_grad = jax.lax.dynamic_update_slice(weight_grad, previous + chunk_grad, offset)
            return (hidden_grad, square, logit_grad_square, weight_grad), None

        sums = (
            jnp.zeros(self.hidden.shape, wide),
            jnp.zeros(len(self.hidden), wide) if with_norms else None,
            jnp.zeros(self.tokens.shape, wide) if with_norms else None,
            jnp.zeros(self.unembedding.shape, wide) if with_weights else None,
        )
        (hidden_grad, square, logit_grad_square, weight_grad), _ = jax.lax.scan(add, sums, jnp.arange(chunks))
        if with_norms:
            summed_norms = jnp.sum(norms(self.hidden) * jnp.sqrt(logit_grad_square), axis=1)
            square = conservative_square(square, summed_norms)
        return hidden_grad.astype(self.hidden.dtype), square, weight_grad

    def token_gradients(self, tokens: Int[Array, "rows length"]) -> Float[Array, "rows length features"]:
        """Columns of each row's gradient of the matrix that belong to some tokens."""
        columns = self.unembedding.T[tokens]
        logits = wide_einsum("bad,btd->bat", self.hidden, columns)
        logit_grads = self._logit_gradients(logits, tokens[:, None, :])
        return jnp.einsum("bat,bad->btd", logit_grads.astype(self.hidden.dtype), self.hidden)

    def _logit_gradients(self, logits, ids):
        softmax_term = jnp.exp(logits - self.lse[..., None]) * self.softmax_grad[..., None]
        return softmax_term + jnp.where(self.tokens[..., None] == ids, self.target_grad[..., None], 0)


def _sharded_gradients(mesh: Mesh | None, head: _Head, with_norms: bool = True, with_weights: bool = True):
    """`head.gradients` under `shard_map`: each device gathers the features, never the vocabulary, of the matrix."""
    if mesh is None or mesh.size == 1:
        return head.gradients(with_norms, with_weights)
    row_spec = partition_spec(mesh, ("rows", None), head.tokens.shape)
    matrix_spec = partition_spec(mesh, ("embed", "vocab"), head.unembedding.shape)
    embed_axes, vocab_axes, row_axes = (
        () if axes is None else axes if isinstance(axes, tuple) else (axes,) for axes in (*matrix_spec, row_spec[0])
    )
    if set(embed_axes) - set(row_axes):
        # The reduce-scatter below needs rows sharded over the feature axes; otherwise let the compiler partition.
        return head.gradients(with_norms, with_weights)

    def local(head: _Head):
        unembedding, first_id = head.unembedding, 0
        if embed_axes:
            unembedding = jax.lax.all_gather(unembedding, embed_axes, axis=0, tiled=True)
        if vocab_axes:
            first_id = jax.lax.axis_index(vocab_axes) * unembedding.shape[1]
        *row_results, weight_grad = head._replace(unembedding=unembedding).gradients(with_norms, with_weights, first_id)
        hidden_grad, square = jax.lax.psum(tuple(row_results), vocab_axes) if vocab_axes else row_results
        out = [hidden_grad, *([square] if with_norms else [])]
        if with_weights:
            other_axes = tuple(axis for axis in row_axes if axis not in embed_axes)
            if other_axes:
                weight_grad = jax.lax.psum(weight_grad, other_axes)
            if embed_axes:
                weight_grad = jax.lax.psum_scatter(weight_grad, embed_axes, scatter_dimension=0, tiled=True)
            out.append(weight_grad)
        return tuple(out)

    in_specs = (_Head(row_spec, matrix_spec, row_spec, row_spec, row_spec, row_spec),)
    norm_specs = [PartitionSpec(*row_spec[:1])] if with_norms else []
    out_specs = (row_spec, *norm_specs, *([matrix_spec] if with_weights else []))
    out = list(jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)(head))
    return out.pop(0), out.pop(0) if with_norms else None, out.pop(0) if with_weights else None
