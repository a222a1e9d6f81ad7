"""Parametric operations whose backward pass also says how long each row's own gradient is.

Every operation that owns a parameter may be given a `NormTracker`, whose value need not be read. What the operation
returns as its cotangent is the squared norm, row by row, of the gradient of this parameter, so that the cotangents of
all operations add up to that of the whole gradient, through scans and rematerialisation alike. No gradient of a single
row is held: ghost norms (Goodfellow, 2015, arXiv 1510.01799; Li et al., 2021, arXiv 2110.05679). With a `rule` each
operation clips its rows before it adds them up (He et al., 2022, arXiv 2212.01539). With the rule `GIVEN` it scales
them by the tracker's value, in which the gradients of the parameters, and nothing else, are then linear.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Bool, Float, Int

from shiq_jax.models.linear import contract, to_input, to_kernel

# By these names a traced program shows which parameters are owned by such operations.
OPERATION, LOOKUP, HEAD = "owned by a tracked operation", "owned by a tracked lookup", "owned by a tracked head"
# Floats of the gradients of single rows, of one parameter, that may be held at once where a norm needs them whole.
BUDGET = 2**26
# A row's gradient is a sum of its places' parts, and never taken for shorter than this share of what their norms add up
# to: where they cancel further, rounding is what its norm would be of, and the sum of clipped rows as well.
CANCELLED = 2.0**-7
# By how much a squared norm is rounded up, over what it is summed up from.
ROUNDING = 2.0**-20
# The rule by which rows are scaled with the tracker's own value, whatever their norms.
GIVEN = "given"
# By this name the backward pass keeps the cotangents that, with that rule, the parameters' gradients are made of.
BOOKED = "cotangent of a tracked operation"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NormTracker:
    """Gradient norms of the rows of one forward pass, each row a unit; `Model.tracking` gives it to all operations.

    Attributes:
        squares: its cotangent is each row's squared gradient norm; its value is read by the rule `GIVEN` alone.
        tie: connects the two uses of a tied table, see `ghost_vocabulary.tied`; None where the table is not tied.
        rule: norms [rows] -> factors [rows], by which every operation scales the rows' gradients of its own parameter;
            None for 1; `GIVEN` for the value of `squares`.
    """

    squares: Float[Array, " rows"]
    tie: Tie | None = None
    rule: Callable[[Array], Array] | str | None = dataclasses.field(default=None, metadata={"static": True})


class Tie(NamedTuple):
    """Connection between the two uses of a tied table: the tokens that are looked up, and zeros with cotangents.

    The lookup sends the cotangent of its vectors through `looked_up`; the head sends, through `lines`, the lines of its
    gradient that belong to the tokens.
    """

    tokens: Int[Array, "rows length"]
    looked_up: Float[Array, "rows length features"]
    lines: Float[Array, "rows length features"]


class Operation(NamedTuple):
    """An operation on an input `[rows, ...]` and one parameter, and its derivatives given the output's cotangent.

    to_weights reads the input, the cotangent (scaled; both without rows that are not finite) and the parameter's shape;
    squared_norm gives `[rows]`. of_rows gives both before they are summed, `[rows, ...]` and `[rows]`, where the norm
    needs every row's gradient anyway and there is room for all of them; else None.
    """

    apply: Callable[[Array, Array], Array]
    to_input: Callable[[Array, Array, Array], Array]
    to_weights: Callable[[Array, Array, tuple[int, ...]], Array]
    squared_norm: Callable[[Array, Array], Array]
    of_rows: Callable[[Array, Array], tuple[Array, Array] | None] = lambda x, s: None


def apply(operation: Operation, x: Array, weights: Array, tracker: NormTracker | None) -> Array:
    """The operation's result; with a tracker it can be differentiated in reverse mode only."""
    if tracker is None:
        return operation.apply(x, weights)
    return _tracked(operation, tracker.rule, x, weights, tracker.squares)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _tracked(operation, rule, x, weights, squares):
    return operation.apply(x, checkpoint_name(weights, OPERATION))


def _forward(operation, rule, x, weights, squares):
    out = operation.apply(x.value, weights.value)
    return out, (x.value, weights.value, squares.value, _learns(weights))


def _backward(operation, rule, kept, cotangent):
    x, weights, squares, learns = kept
    s = jax.lax.optimization_barrier(instantiate(cotangent))
    before = operation.to_input(x, weights, s).astype(x.dtype)
    if learns is None:
        return before, None, None
    if callable(rule) and (rows := operation.of_rows(x, s)):
        grads, square = rows
        factors = _over(row_factor(rule, square), grads)
        total = jnp.sum(jnp.where(factors > 0, factors * grads, 0), axis=0).reshape(weights.shape)
        return before, total.astype(weights.dtype), square.astype(squares.dtype)
    square = operation.squared_norm(x, s).astype(squares.dtype)
    # A row of which either is not finite has no norm that is, and no part in the sum.
    x, s = zero_other_rows(finite_rows(x), x), zero_other_rows(finite_rows(s), s)
    s = scale_rows(checkpoint_name(s, BOOKED) if rule is GIVEN else s, rule, square, squares)
    return before, operation.to_weights(x, s, weights.shape).astype(weights.dtype), square


_tracked.defvjp(_forward, _backward, symbolic_zeros=True)


def _learns(weights) -> tuple | None:
    """Whether the parameter is differentiated; by the structure of a pytree, which unlike a value is known in time."""
    return () if weights.perturbed else None


def instantiate(cotangent) -> Array:
    """A cotangent as an array."""
    if isinstance(cotangent, SymbolicZero):
        return jnp.zeros(cotangent.shape, cotangent.dtype)
    return cotangent


def finite_rows(*arrays: Array) -> Bool[Array, " rows"]:
    """Which rows hold nothing but numbers."""
    fine = [jnp.all(jnp.isfinite(each), axis=tuple(range(1, each.ndim))) for each in arrays]
    return functools.reduce(jnp.logical_and, fine)


def zero_other_rows(rows: Bool[Array, " rows"], x: Array) -> Array:
    """The array with zeros in the other rows: in a sum over rows, 0 times infinity would poison all."""
    return jnp.where(_over(rows, x), x, 0)


def scale_rows(
    s: Array, rule: Callable | str | None, square: Float[Array, " rows"], given: Float[Array, " rows"], uses: int = 1
) -> Array:
    """The cotangent with each row scaled as the rule wants for its norm; by one of `uses` that share a parameter."""
    if rule is None:
        return s
    factors = given if rule is GIVEN else row_factor(rule, square, uses)
    return (_over(factors, s) * s).astype(s.dtype)


def row_factor(rule: Callable, square: Float[Array, " rows"], uses: int = 1) -> Float[Array, " rows"]:
    """What the rule scales rows by, given their squared norm and one of `uses` of a parameter; 0 if it is no number."""
    norm = jnp.sqrt(jnp.maximum(square, 0))
    # Twice as long as it is, it is clipped to half as much.
    return jnp.where(jnp.isfinite(norm), rule(uses * norm), 0)


def _over(rows: Array, like: Array) -> Array:
    return rows.reshape(-1, *(1,) * (like.ndim - 1))


# The operations.


@functools.cache
def product(contracted: int) -> Operation:
    """The last `contracted` dimensions of the input against the first ones of a kernel."""

    def flat(x, s):
        inputs = x.reshape(x.shape[0], -1, math.prod(x.shape[x.ndim - contracted :]))
        outputs = s.reshape(*inputs.shape[:2], -1)
        return inputs, outputs, jnp.sum(norms(inputs) * norms(outputs), axis=1)

    def squared_norm(x, s):
        inputs, outputs, total = flat(x, s)
        return bounded_square(squared_norm_of_product(inputs, outputs), total)

    def of_rows(x, s):
        inputs, outputs, total = flat(x, s)
        if gram_is_cheaper(inputs, outputs) or len(x) * inputs.shape[2] * outputs.shape[2] > BUDGET:
            return None
        grads = accumulated("bti,bto->bio", inputs, outputs)
        square = bounded_square(jnp.sum(jnp.square(grads), axis=(1, 2)), total)
        return grads.reshape(len(x), *x.shape[x.ndim - contracted :], *s.shape[x.ndim - contracted :]), square

    return Operation(
        apply=lambda x, kernel: contract(x, kernel.astype(x.dtype), contracted),
        to_input=lambda x, kernel, s: to_input(kernel.astype(s.dtype), s, contracted),
        to_weights=lambda x, s, shape: to_kernel(*_operands(x, s), contracted, _precise(s)),
        squared_norm=squared_norm,
        of_rows=of_rows,
    )


def gram_is_cheaper(x: Float[Array, "rows T inputs"], s: Float[Array, "rows T outputs"]) -> bool:
    """Whether a row's x^T s takes more operations than the products of all pairs of places of x, and of s."""
    length, inputs, outputs = x.shape[1], x.shape[2], s.shape[2]
    return length * (inputs + outputs) <= inputs * outputs


def squared_norm_of_product(
    x: Float[Array, "rows T inputs"], s: Float[Array, "rows T outputs"]
) -> Float[Array, " rows"]:
    """Squared norm of each row's x^T s, by whichever way takes fewer operations.

    Either sum_tu (x_t . x_u) (s_t . s_u), in time T^2 (inputs + outputs), or the matrix itself, in time
    T * inputs * outputs, a part of its lines at a time.
    """
    if gram_is_cheaper(x, s):
        return jnp.sum(accumulated("bti,bui->btu", x, x) * accumulated("bto,buo->btu", s, s), axis=(1, 2))
    inputs, outputs = x.shape[2], s.shape[2]
    parts = -(-len(x) * inputs * outputs // BUDGET)
    lines = -(-inputs // parts)

    def add(total, part):
        return total + jnp.sum(jnp.square(accumulated("bti,bto->bio", part, s)), axis=(1, 2)), None

    x = jnp.pad(x, ((0, 0), (0, 0), (0, -inputs % lines)))
    x = jnp.moveaxis(x.reshape(*x.shape[:2], -1, lines), 2, 0)
    return jax.lax.scan(add, jnp.zeros(len(s), _precise(s)), x)[0]


def bounded_square(square: Float[Array, " rows"], total: Float[Array, " rows"]) -> Float[Array, " rows"]:
    """A squared norm, rounded up, of a sum of parts whose norms add up to `total`; safe where they cancel."""
    return (1 + ROUNDING) * jnp.maximum(square, jnp.square(CANCELLED * total))


def norms(x: Float[Array, "*lead features"]) -> Float[Array, "*lead"]:
    """L2 over the last dimension, in float32 at least."""
    return jnp.sqrt(jnp.sum(jnp.square(x.astype(_precise(x))), axis=-1))


def _summed(x, s, shape):
    return jnp.sum(s, axis=tuple(range(s.ndim - len(shape))), dtype=_precise(s))


def _square_of_shift(x, s):
    """Of the sum over places; a bias has the input's dimensions from the third on."""
    return _square_of_sum(s.reshape(*s.shape[:2], -1))


def _square_of_scale(x, s):
    return _square_of_sum((x * s).reshape(len(s), -1, s.shape[-1]))


def _square_of_sum(parts: Float[Array, "rows places features"]) -> Float[Array, " rows"]:
    summed = jnp.sum(parts, axis=1, dtype=_precise(parts))
    return bounded_square(jnp.sum(jnp.square(summed), axis=-1), jnp.sum(norms(parts), axis=1))


SHIFT = Operation(
    apply=lambda x, bias: x + bias.astype(x.dtype),
    to_input=lambda x, bias, s: s,
    to_weights=_summed,
    squared_norm=_square_of_shift,
)

SCALE = Operation(
    apply=lambda x, scale: x * scale.astype(x.dtype),
    to_input=lambda x, scale, s: s * scale.astype(s.dtype),
    to_weights=lambda x, s, shape: _summed(x, x * s, shape),
    squared_norm=_square_of_scale,
)


def accumulated(subscripts: str, a: Array, b: Array) -> Array:
    """`jnp.einsum` of two arrays, summed in float32 at least."""
    return jnp.einsum(subscripts, *_operands(a, b), preferred_element_type=_precise(a))


def _operands(a: Array, b: Array) -> tuple[Array, Array]:
    """The arrays, in float32 where a CPU would have to multiply bfloat16 and sum in float32: not all shapes are had."""
    if jax.default_backend() == "cpu":
        return a.astype(_precise(a)), b.astype(_precise(b))
    return a, b


def _precise(x: Array) -> Any:
    return jnp.promote_types(x.dtype, jnp.float32)
