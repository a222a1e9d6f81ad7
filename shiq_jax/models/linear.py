"""The product of activations and weights, with a backward pass that spells out its two products."""

import functools

import jax
from jax.typing import DTypeLike
from jaxtyping import Array, Float


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def contract(
    x: Float[Array, "*rows_and_inputs"], kernel: Float[Array, "*inputs_and_outputs"], contracted: int
) -> Float[Array, "*rows_and_outputs"]:
    """The last `contracted` dimensions of `x` against the first ones of `kernel`, as `jnp.tensordot` does.

    Reverse mode only. The transposition rule of `dot_general` makes the kernel's gradient transposed and leaves it to
    the compiler to turn a product of whole activations round: on a CPU that doubles the time of the backward pass.
    """
    ours, theirs = tuple(range(x.ndim - contracted, x.ndim)), tuple(range(contracted))
    return jax.lax.dot_general(x, kernel, ((ours, theirs), ((), ())))


def _forward(x, kernel, contracted):
    return contract(x, kernel, contracted), (x, kernel)


def _backward(contracted, kept, cotangent):
    x, kernel = kept
    # Behind the barrier the cotangent is one array that both products read, not an expression fused into a copy of it.
    cotangent = jax.lax.optimization_barrier(cotangent)
    return to_input(kernel, cotangent, contracted), to_kernel(x, cotangent, contracted)


contract.defvjp(_forward, _backward)


def to_input(kernel: Array, cotangent: Array, contracted: int) -> Array:
    """Gradient of the input, given that of the result."""
    outputs = kernel.ndim - contracted
    own, theirs = tuple(range(cotangent.ndim - outputs, cotangent.ndim)), tuple(range(contracted, kernel.ndim))
    return jax.lax.dot_general(cotangent, kernel, ((own, theirs), ((), ())))


def to_kernel(x: Array, cotangent: Array, contracted: int, precise: DTypeLike | None = None) -> Array:
    """Gradient of the kernel, summed over all rows; precise: the dtype of the sum, by default the operands'."""
    over_rows = (tuple(range(x.ndim - contracted)),) * 2
    return jax.lax.dot_general(x, cotangent, (over_rows, ((), ())), preferred_element_type=precise)
