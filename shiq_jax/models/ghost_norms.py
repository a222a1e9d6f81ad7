"""Parametric operations whose backward pass also returns per-row gradient norms (ghost norms).

Each operation accepts a `NormTracker`. Its VJP returns, as the tracker's cotangent, the squared norm of each row's
gradient of the operation's parameter; the cotangents of all operations sum to the squared norm of the whole gradient,
also through scans and rematerialization. No per-row gradient is materialized (Goodfellow, 2015, arXiv 1510.01799; Li et
al., 2021, arXiv 2110.05679). With a `rule` each operation clips its rows before summing them (group-wise clipping, He
et al., 2022, arXiv 2212.01539). With the rule `PRECOMPUTED` it scales the rows by the tracker's value, and the
parameters' gradients are linear in these factors (book-keeping, Bu et al., 2022, arXiv 2210.00038).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Bool, Float, Int

from shiq_jax.models.linear import contract, input_gradient, kernel_gradient

# `checkpoint_name` of a tracked parameter: identifies it in a traced program, see `privacy.coverage`.
OPERATION, LOOKUP, HEAD = "parameter of a tracked operation", "parameter of a tracked lookup", "parameter of an LM head"
# Maximum number of elements of the per-row gradients of one parameter that are materialized at once.
BUDGET = 2**26
# Lower bound of a row's gradient norm, as a share of the summed norms of its per-token contributions. Below it the
# contributions cancel so far that rounding errors dominate both the norm and the sum of clipped rows.
CANCELLATION_FLOOR = 2.0**-7
# Relative amount by which squared norms are rounded up, so that rounding errors never understate a norm.
ROUNDING = 2.0**-20
# Rule that scales rows by the tracker's value, independently of their norms.
PRECOMPUTED = "precomputed"
# `checkpoint_name` of the cotangents that the parameters' gradients are computed from under `PRECOMPUTED`.
COTANGENT = "cotangent of a tracked operation"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NormTracker:
    """Per-row gradient norms of one forward pass; `Model.tracking` passes it to all parametric operations.

    Attributes:
        squares: its cotangent is the squared gradient norm of each row; its value is read by `PRECOMPUTED` only.
        tie: connects the two uses of a tied embedding table, see `ghost_vocabulary.with_tie`; None if untied.
        rule: norms [rows] -> factors [rows], by which each operation scales the rows' gradients of its own parameter;
            None for no scaling; `PRECOMPUTED` to scale by the value of `squares`.
    """

    squares: Float[Array, " rows"]
    tie: Tie | None = None
    rule: Callable[[Array], Array] | str | None = dataclasses.field(default=None, metadata={"static": True})


class Tie(NamedTuple):
    """Link between the two uses of a tied embedding table: the looked-up tokens, and zeros that carry cotangents.

    Attributes:
        tokens: tokens that the lookup reads.
        embedding_grads: its cotangent, set by the lookup, is the cotangent of the embeddings.
        head_grads: its cotangent, set by the LM head, holds the rows of the head's gradient that belong to `tokens`.
    """

    tokens: Int[Array, "rows length"]
    embedding_grads: Float[Array, "rows length features"]
    head_grads: Float[Array, "rows length features"]


class Operation(NamedTuple):
    """An operation on an input `[rows, ...]` and one parameter, with its derivatives.

    Attributes:
        apply: (input, parameter) -> output.
        input_gradient: (input, parameter, cotangent) -> gradient of the input.
        parameter_gradient: (input, cotangent, parameter shape) -> gradient of the parameter, summed over the rows.
        squared_norm: (input, cotangent, parameter shape) -> squared norm [rows] of each row's gradient of the parameter.
        per_row: (input, cotangent) -> (per-row gradients [rows, ...], squared norms [rows]), or None where computing
            the norm does not materialize per-row gradients or they exceed `BUDGET`.
    """

    apply: Callable[[Array, Array], Array]
    input_gradient: Callable[[Array, Array, Array], Array]
    parameter_gradient: Callable[[Array, Array, tuple[int, ...]], Array]
    squared_norm: Callable[[Array, Array, tuple[int, ...]], Array]
    per_row: Callable[[Array, Array], tuple[Array, Array] | None] = lambda x, cotangent: None


def apply(operation: Operation, x: Array, weights: Array, tracker: NormTracker | None) -> Array:
    """Apply an operation; with a tracker the result supports reverse-mode differentiation only."""
    if tracker is None:
        return operation.apply(x, weights)
    return _tracked(operation, tracker.rule, x, weights, tracker.squares)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _tracked(operation, rule, x, weights, squares):
    return operation.apply(x, checkpoint_name(weights, OPERATION))


def _forward(operation, rule, x, weights, squares):
    out = operation.apply(x.value, weights.value)
    return out, (x.value, weights.value, squares.value, is_differentiated(weights))


def _backward(operation, rule, residuals, cotangent):
    x, weights, squares, differentiated = residuals
    cotangent = jax.lax.optimization_barrier(instantiate(cotangent))
    x_grad = operation.input_gradient(x, weights, cotangent).astype(x.dtype)
    if differentiated is None:
        return x_grad, None, None
    if callable(rule) and (per_row := operation.per_row(x, cotangent)):
        grads, square = per_row
        factors = _expand_rows(row_factors(rule, square), grads)
        total = jnp.sum(jnp.where(factors > 0, factors * grads, 0), axis=0).reshape(weights.shape)
        return x_grad, total.astype(weights.dtype), square.astype(squares.dtype)
    square = operation.squared_norm(x, cotangent, weights.shape).astype(squares.dtype)
    # A row with non-finite values has a non-finite norm and is excluded from the sum.
    x, cotangent = keep_rows(finite_rows(x), x), keep_rows(finite_rows(cotangent), cotangent)
    if rule is PRECOMPUTED:
        cotangent = checkpoint_name(cotangent, COTANGENT)
    cotangent = scale_rows(cotangent, rule, square, squares)
    return x_grad, operation.parameter_gradient(x, cotangent, weights.shape).astype(weights.dtype), square


_tracked.defvjp(_forward, _backward, symbolic_zeros=True)


def is_differentiated(argument) -> tuple | None:
    """() if a `custom_vjp` argument is differentiated, else None; unlike a bool, both are static as residuals."""
    return () if argument.perturbed else None


def instantiate(cotangent) -> Array:
    """Replace a symbolic zero with an array."""
    if isinstance(cotangent, SymbolicZero):
        return jnp.zeros(cotangent.shape, cotangent.dtype)
    return cotangent


def finite_rows(*arrays: Array) -> Bool[Array, " rows"]:
    """Rows in which all arrays are finite."""
    finite = [jnp.all(jnp.isfinite(x), axis=tuple(range(1, x.ndim))) for x in arrays]
    return functools.reduce(jnp.logical_and, finite)


def keep_rows(rows: Bool[Array, " rows"], x: Array) -> Array:
    """`x` with all other rows set to zero; multiplying by zero instead would turn infinities into NaN."""
    return jnp.where(_expand_rows(rows, x), x, 0)


def scale_rows(
    cotangent: Array,
    rule: Callable | str | None,
    square: Float[Array, " rows"],
    precomputed: Float[Array, " rows"],
    uses: int = 1,
) -> Array:
    """Scale each row of a cotangent by the rule's factor; uses: number of operations that share the parameter."""
    if rule is None:
        return cotangent
    factors = precomputed if rule is PRECOMPUTED else row_factors(rule, square, uses)
    return (_expand_rows(factors, cotangent) * cotangent).astype(cotangent.dtype)


def row_factors(rule: Callable, square: Float[Array, " rows"], uses: int = 1) -> Float[Array, " rows"]:
    """The rule's factors for rows with the given squared norms; 0 for a norm that is not finite.

    uses: number of operations that share the parameter. Each is clipped to 1 / uses of the clip norm.
    """
    norm = jnp.sqrt(jnp.maximum(square, 0))
    return jnp.where(jnp.isfinite(norm), rule(uses * norm), 0)


def _expand_rows(rows: Array, like: Array) -> Array:
    return rows.reshape(-1, *(1,) * (like.ndim - 1))


@functools.cache
def product(num_inputs: int) -> Operation:
    """Product with a kernel; contracts the last `num_inputs` dimensions of the input with the kernel's first ones."""

    def flatten(x, cotangent):
        inputs = x.reshape(x.shape[0], -1, math.prod(x.shape[x.ndim - num_inputs :]))
        outputs = cotangent.reshape(*inputs.shape[:2], -1)
        return inputs, outputs, jnp.sum(norms(inputs) * norms(outputs), axis=1)

    def squared_norm(x, cotangent, shape):
        inputs, outputs, summed_norms = flatten(x, cotangent)
        return conservative_square(squared_norm_of_product(inputs, outputs), summed_norms)

    def per_row(x, cotangent):
        inputs, outputs, summed_norms = flatten(x, cotangent)
        if gram_is_cheaper(inputs, outputs) or len(x) * inputs.shape[2] * outputs.shape[2] > BUDGET:
            return None
        grads = wide_einsum("bti,bto->bio", inputs, outputs)
        square = conservative_square(jnp.sum(jnp.square(grads), axis=(1, 2)), summed_norms)
        return grads.reshape(len(x), *x.shape[x.ndim - num_inputs :], *cotangent.shape[x.ndim - num_inputs :]), square

    return Operation(
        apply=lambda x, kernel: contract(x, kernel.astype(x.dtype), num_inputs),
        input_gradient=lambda x, kernel, cotangent: input_gradient(
            kernel.astype(cotangent.dtype), cotangent, num_inputs
        ),
        parameter_gradient=lambda x, cotangent, shape: kernel_gradient(
            *_widen_on_cpu(x, cotangent), num_inputs, _wide_dtype(cotangent)
        ),
        squared_norm=squared_norm,
        per_row=per_row,
    )


def gram_is_cheaper(x: Float[Array, "rows T inputs"], cotangent: Float[Array, "rows T outputs"]) -> bool:
    """Whether the two T x T Gram matrices of a row cost fewer operations than its gradient x^T cotangent."""
    length, inputs, outputs = x.shape[1], x.shape[2], cotangent.shape[2]
    return length * (inputs + outputs) <= inputs * outputs


def squared_norm_of_product(
    x: Float[Array, "rows T inputs"], cotangent: Float[Array, "rows T outputs"]
) -> Float[Array, " rows"]:
    """Squared Frobenius norm of each row's x^T s, s the cotangent, by the cheaper of two methods.

    The Gram method computes sum_tu (x_t . x_u) (s_t . s_u) in time T^2 (inputs + outputs). The direct method computes
    the product in time T * inputs * outputs, in slices of at most `BUDGET` elements.
    """
    if gram_is_cheaper(x, cotangent):
        grams = wide_einsum("bti,bui->btu", x, x), wide_einsum("bto,buo->btu", cotangent, cotangent)
        return jnp.sum(grams[0] * grams[1], axis=(1, 2))
    inputs, outputs = x.shape[2], cotangent.shape[2]
    num_slices = -(-len(x) * inputs * outputs // BUDGET)
    size = -(-inputs // num_slices)

    def add(total, x_slice):
        return total + jnp.sum(jnp.square(wide_einsum("bti,bto->bio", x_slice, cotangent)), axis=(1, 2)), None

    x = jnp.pad(x, ((0, 0), (0, 0), (0, -inputs % size)))
    x = jnp.moveaxis(x.reshape(*x.shape[:2], -1, size), 2, 0)
    return jax.lax.scan(add, jnp.zeros(len(cotangent), _wide_dtype(cotangent)), x)[0]


def conservative_square(square: Float[Array, " rows"], summed_norms: Float[Array, " rows"]) -> Float[Array, " rows"]:
    """Upper bound of a squared norm under rounding and cancellation.

    summed_norms: sum of the norms of the contributions that add up to the vector.
    """
    return (1 + ROUNDING) * jnp.maximum(square, jnp.square(CANCELLATION_FLOOR * summed_norms))


def norms(x: Float[Array, "*lead features"]) -> Float[Array, "*lead"]:
    """L2 norm over the last dimension, in float32 or wider."""
    return jnp.sqrt(jnp.sum(jnp.square(x.astype(_wide_dtype(x))), axis=-1))


def _sum_to_shape(cotangent, shape):
    return jnp.sum(cotangent, axis=tuple(range(cotangent.ndim - len(shape))), dtype=_wide_dtype(cotangent))


def _squared_norm_of_sum(terms: Float[Array, "rows *positions_and_parameter"], shape: tuple[int, ...]):
    """Squared norm [rows] of the sum over positions, the dimensions between the rows and those of the parameter."""
    terms = terms.reshape(len(terms), -1, math.prod(shape))
    total = jnp.sum(terms, axis=1, dtype=_wide_dtype(terms))
    return conservative_square(jnp.sum(jnp.square(total), axis=-1), jnp.sum(norms(terms), axis=1))


def _last_dimensions(parameter: Array, x: Array) -> Array:
    """The parameter in the dtype of `x`, whose last dimensions it must have; broadcasting would change its gradient."""
    chex.assert_shape(parameter, x.shape[max(x.ndim - parameter.ndim, 1) :])
    return parameter.astype(x.dtype)


BIAS = Operation(
    apply=lambda x, bias: x + _last_dimensions(bias, x),
    input_gradient=lambda x, bias, cotangent: cotangent,
    parameter_gradient=lambda x, cotangent, shape: _sum_to_shape(cotangent, shape),
    squared_norm=lambda x, cotangent, shape: _squared_norm_of_sum(cotangent, shape),
)

SCALE = Operation(
    apply=lambda x, scale: x * _last_dimensions(scale, x),
    input_gradient=lambda x, scale, cotangent: cotangent * scale.astype(cotangent.dtype),
    parameter_gradient=lambda x, cotangent, shape: _sum_to_shape(x * cotangent, shape),
    squared_norm=lambda x, cotangent, shape: _squared_norm_of_sum(x * cotangent, shape),
)


def wide_einsum(subscripts: str, a: Array, b: Array) -> Array:
    """`jnp.einsum` of two arrays, accumulated in float32 or wider."""
    return jnp.einsum(subscripts, *_widen_on_cpu(a, b), preferred_element_type=_wide_dtype(a))


def _widen_on_cpu(a: Array, b: Array) -> tuple[Array, Array]:
    """Cast to float32 or wider on CPU, which lacks some bfloat16 products with float32 accumulation."""
    if jax.default_backend() == "cpu":
        return a.astype(_wide_dtype(a)), b.astype(_wide_dtype(b))
    return a, b


def _wide_dtype(x: Array) -> Any:
    return jnp.promote_types(x.dtype, jnp.float32)
