"""The two tracked operations on the vocabulary, looking tokens up and predicting them, and what a tied table adds.

A table E that is also the head has as gradient the sum of two matrices, and the squared norm of a sum is not the sum of
the squared norms: the cross term is 2 sum_t <s_t, h_t>, s_t the cotangent of the vector that was looked up at place t
and h_t the line of the head's gradient that belongs to the token there. Before either use `tied` makes two arrays of
zeros whose cotangents are the s_t and the h_t, so that its own backward pass, which comes last, computes the norm.
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
    accumulated,
    bounded_square,
    finite_rows,
    instantiate,
    norms,
    scale_rows,
    squared_norm_of_product,
    zero_other_rows,
)
from shiq_jax.models.sharded_statistics import sharded_token_stats
from shiq_jax.objectives import TokenStats, token_stats
from shiq_jax.sharding import partition_spec

# Logits of all rows that are computed at once in the head's backward pass.
BUDGET = 2**26


def tied(tracker: NormTracker, tokens: Int[Array, "rows length"], features: int, dtype: DTypeLike) -> NormTracker:
    """The tracker of a model whose table of `features` columns is also its head, for one pass that looks up `tokens`.

    dtype: of what the two uses send each other.
    """
    return dataclasses.replace(tracker, tie=Tie(tokens, *_tied((features, dtype), tracker.squares, tokens)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _tied(kind, squares, tokens):
    zeros = jnp.zeros((*tokens.shape, kind[0]), kind[1])
    return zeros, zeros


def _tied_forward(kind, squares, tokens):
    return _tied(kind, squares.value, tokens.value), (squares.value, tokens.value)


def _tied_backward(kind, kept, cotangents):
    squares, tokens = kept
    if all(isinstance(each, SymbolicZero) for each in cotangents):
        return None, None
    s, lines = map(instantiate, cotangents)
    square = _square_of_lookup(tokens, s)
    # The cross term may be below 0, and is rounded up as well.
    square += 2 * jnp.sum(s * lines, axis=(1, 2))
    square += 2 * ROUNDING * jnp.sum(norms(s) * norms(lines), axis=1)
    return square.astype(squares.dtype), None


_tied.defvjp(_tied_forward, _tied_backward, symbolic_zeros=True)


def lookup(
    table: Float[Array, "vocab features"], tokens: Int[Array, "rows length"], tracker: NormTracker
) -> Float[Array, "rows length features"]:
    """The tokens' vectors, tracked."""
    sent = None if tracker.tie is None else tracker.tie.looked_up.astype(table.dtype)
    return _lookup(tracker.rule, table, tokens, tracker.squares, sent)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _lookup(rule, table, tokens, squares, sent):
    return checkpoint_name(table, LOOKUP)[tokens]


def _lookup_forward(rule, table, tokens, squares, sent):
    kept = table.value, tokens.value, squares.value, None if sent is None else (), () if table.perturbed else None
    return table.value[tokens.value], kept


def _lookup_backward(rule, kept, cotangent):
    table, tokens, squares, tie, learns = kept
    if learns is None:
        return None, None, None, None
    s = instantiate(cotangent)
    joint = tie is not None and _has_one_norm(rule)
    square = None if joint else _square_of_lookup(tokens, s).astype(squares.dtype)
    scaled_s = scale_rows(zero_other_rows(finite_rows(s), s), rule, square, squares, uses=1 if tie is None else 2)
    precise = jnp.promote_types(s.dtype, jnp.float32)
    gradient = jnp.zeros(table.shape, precise).at[tokens].add(scaled_s.astype(precise))
    return gradient.astype(table.dtype), None, square, s if joint else None


_lookup.defvjp(_lookup_forward, _lookup_backward, symbolic_zeros=True)


def _square_of_lookup(tokens: Int[Array, "rows length"], s: Float[Array, "rows length features"]):
    """Squared norm of each row's gradient of the table, given the cotangents of the vectors."""
    same = tokens[:, :, None] == tokens[:, None, :]
    gram = accumulated("btd,bud->btu", s, s)
    return bounded_square(jnp.sum(jnp.where(same, gram, 0), axis=(1, 2)), jnp.sum(norms(s), axis=1))


def _has_one_norm(rule: Callable | str | None) -> bool:
    """Whether the norm of a tied table is that of both uses: not where each operation clips its own use."""
    return not callable(rule)


def statistics(
    hidden: Float[Array, "rows A features"],
    unembedding: Float[Array, "features vocab"],
    tokens: Int[Array, "rows A"],
    tracker: NormTracker,
    mesh: Mesh | None = None,
) -> TokenStats:
    """`objectives.token_stats` of tokens that hidden states predict, tracked; rows and words stay where they are."""
    tie = None if tracker.tie is None else (tracker.tie.tokens, tracker.tie.lines.astype(hidden.dtype))
    return _statistics(tracker.rule, mesh, hidden, unembedding, tokens, tracker.squares, tie)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _statistics(rule, mesh, hidden, unembedding, tokens, squares, tie):
    return _untracked(mesh, hidden, checkpoint_name(unembedding, HEAD), tokens)


def _untracked(mesh, hidden, unembedding, tokens):
    if mesh is None:
        return token_stats(hidden, unembedding, tokens)
    return sharded_token_stats(hidden, unembedding, tokens, mesh=mesh)


def _statistics_forward(rule, mesh, hidden, unembedding, tokens, squares, tie):
    learns = () if unembedding.perturbed else None
    looked_up = None if tie is None else tie[0].value
    hidden, unembedding, tokens, squares = (each.value for each in (hidden, unembedding, tokens, squares))
    stats = _untracked(mesh, hidden, unembedding, tokens)
    return stats, (hidden, unembedding, tokens, squares, looked_up, stats.lse, learns)


def _statistics_backward(rule, mesh, kept, cotangents):
    hidden, unembedding, tokens, squares, looked_up, lse, learns = kept
    own, total = instantiate(cotangents.logp), instantiate(cotangents.lse)
    # Rows that are not finite are taken out of all sums, and their norm says so.
    fine = finite_rows(hidden, own, total, lse)
    hidden, own, total, lse = (zero_other_rows(fine, each) for each in (hidden, own, total, lse))
    head = _Head(hidden, unembedding.astype(hidden.dtype), tokens, lse, own, total - own)
    if learns is None:
        return _gradients(mesh, head, squares=False, weights=False)[0], None, None, None, None
    to_hidden, square, to_weights = _gradients(mesh, head, weights=rule is None)
    square = jnp.where(fine, square, jnp.nan)
    if rule is not None:
        uses = 1 if looked_up is None else 2

        # Slopes are made again rather than kept: there are as many as rows times words.
        @jax.checkpoint
        def sum_of_scaled(head, square, given):
            own, shared = (scale_rows(each, rule, square, given, uses) for each in (head.own, head.shared))
            return _gradients(mesh, head._replace(own=own, shared=shared), squares=False)[2]

        to_weights = sum_of_scaled(head, square, squares)
    sent = (None, head.lines(looked_up)) if looked_up is not None and _has_one_norm(rule) else None
    return to_hidden, to_weights.astype(unembedding.dtype), None, square.astype(squares.dtype), sent


_statistics.defvjp(_statistics_forward, _statistics_backward, symbolic_zeros=True)


class _Head(NamedTuple):
    """A head in its backward pass: what it saw, and what is wanted of it.

    The slope of the loss along the logits of a place is `own` at the token there, and `shared` spread as the
    probabilities are.
    """

    hidden: Float[Array, "rows A features"]
    unembedding: Float[Array, "features vocab"]
    tokens: Int[Array, "rows A"]
    lse: Float[Array, "rows A"]
    own: Float[Array, "rows A"]
    shared: Float[Array, "rows A"]

    def gradients(self, squares: bool = True, weights: bool = True, first: int | Int[Array, ""] = 0):
        """Of the hidden states; their rows' squared norms of the matrix's gradient; that gradient, summed over rows.

        Logits of a part of the vocabulary are there at a time. What is not asked for is None. first: the word that the
        first column stands for.
        """
        words, rows = self.unembedding.shape[1], self.tokens.size
        parts = -(-words * rows // BUDGET)
        size = -(-words // parts)
        precise = self.lse.dtype

        def add(sums, part):
            # The last part begins earlier, so that all are of one size, and leaves out what the one before it had.
            start = jnp.minimum(part * size, words - size)
            columns = jax.lax.dynamic_slice_in_dim(self.unembedding, start, size, axis=1)
            ids = start + jnp.arange(size)
            slopes = jnp.where(ids >= part * size, self._slopes(columns, first + ids), 0).astype(self.hidden.dtype)
            to_hidden, square, size_of_slopes, to_weights = sums
            to_hidden = to_hidden + accumulated("bav,dv->bad", slopes, columns)
            if squares:
                square = square + squared_norm_of_product(self.hidden, slopes)
                size_of_slopes = size_of_slopes + jnp.square(norms(slopes))
            if weights:
                place = (jnp.zeros_like(start), start)
                before = jax.lax.dynamic_slice(to_weights, place, columns.shape)
                own = accumulated("bad,bav->dv", self.hidden, slopes)
                to_weights = jax.lax.dynamic_update_slice(to_weights, before + own, place)
            return (to_hidden, square, size_of_slopes, to_weights), None

        sums = (
            jnp.zeros(self.hidden.shape, precise),
            jnp.zeros(len(self.hidden), precise) if squares else None,
            jnp.zeros(self.tokens.shape, precise) if squares else None,
            jnp.zeros(self.unembedding.shape, precise) if weights else None,
        )
        (to_hidden, square, size_of_slopes, to_weights), _ = jax.lax.scan(add, sums, jnp.arange(parts))
        if squares:
            square = bounded_square(square, jnp.sum(norms(self.hidden) * jnp.sqrt(size_of_slopes), axis=1))
        return to_hidden.astype(self.hidden.dtype), square, to_weights

    def lines(self, tokens: Int[Array, "rows length"]) -> Float[Array, "rows length features"]:
        """Of the transposed gradient of the matrix, row by row, the lines of some tokens."""
        columns = self.unembedding.T[tokens]
        logits = accumulated("bad,btd->bat", self.hidden, columns)
        slopes = self._from_logits(logits, tokens[:, None, :])
        return jnp.einsum("bat,bad->btd", slopes.astype(self.hidden.dtype), self.hidden)

    def _slopes(self, columns, ids):
        logits = accumulated("bad,dv->bav", self.hidden, columns)
        return self._from_logits(logits, ids)

    def _from_logits(self, logits, ids):
        spread = jnp.exp(logits - self.lse[..., None]) * self.shared[..., None]
        return spread + jnp.where(self.tokens[..., None] == ids, self.own[..., None], 0)


def _gradients(mesh: Mesh | None, head: _Head, squares: bool = True, weights: bool = True):
    """`head.gradients` where rows and words are: the matrix is whole over its features only, and for as long."""
    if mesh is None or mesh.size == 1:
        return head.gradients(squares, weights)
    rows = partition_spec(mesh, ("rows", None), head.tokens.shape)
    matrix = partition_spec(mesh, ("embed", "vocab"), head.unembedding.shape)
    features, words, over_rows = (
        () if axes is None else axes if isinstance(axes, tuple) else (axes,) for axes in (*matrix, rows[0])
    )
    if set(features) - set(over_rows):
        # Rows that not all of these devices have a share of: the compiler knows what to do.
        return head.gradients(squares, weights)

    def local(head: _Head):
        whole, first = head.unembedding, 0
        if features:
            whole = jax.lax.all_gather(whole, features, axis=0, tiled=True)
        if words:
            first = jax.lax.axis_index(words) * whole.shape[1]
        found = head._replace(unembedding=whole).gradients(squares, weights, first)
        to_hidden, square = jax.lax.psum(found[:2], words) if words else found[:2]
        out = [to_hidden, *([square] if squares else [])]
        if weights:
            rest = tuple(axis for axis in over_rows if axis not in features)
            total = jax.lax.psum(found[2], rest) if rest else found[2]
            # The sum over the devices that the features are cut over is cut again at once.
            out.append(jax.lax.psum_scatter(total, features, scatter_dimension=0, tiled=True) if features else total)
        return tuple(out)

    specs = (rows, *([PartitionSpec(*rows[:1])] if squares else []), *([matrix] if weights else []))
    given = _Head(rows, matrix, rows, rows, rows, rows)
    found = list(jax.shard_map(local, mesh=mesh, in_specs=(given,), out_specs=specs, check_vma=False)(head))
    return found.pop(0), found.pop(0) if squares else None, found.pop(0) if weights else None
