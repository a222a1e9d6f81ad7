"""Matrix product of activations and weights with a custom backward pass."""

import functools

import jax
from jax.typing import DTypeLike
from jaxtyping import Array, Float


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def contract(
    x: Float[Array, "*rows_and_inputs"], kernel: Float[Array, "*inputs_and_outputs"], num_inputs: int
) -> Float[Array, "*rows_and_outputs"]:
    """Contract the last `num_inputs` dimensions of `x` with the first ones of `kernel`, like `jnp.tensordot`.

    Reverse mode only. JAX's transposition rule for `dot_general` produces the kernel gradient transposed; the compiler
    then transposes a product as large as the activations, which doubles the time of the backward pass on CPU.
    """
    x_axes, kernel_axes = tuple(range(x.ndim - num_inputs, x.ndim)), tuple(range(num_inputs))
    return jax.lax.dot_general(x, kernel, ((x_axes, kernel_axes), ((), ())))


def _forward(x, kernel, num_inputs):
    return contract(x, kernel, num_inputs), (x, kernel)


def _backward(num_inputs, residuals, cotangent):
    x, kernel = residuals
    # Without the barrier XLA fuses the cotangent's expression into both products and computes it twice.
    cotangent = jax.lax.optimization_barrier(cotangent)
    return input_gradient(kernel, cotangent, num_inputs), kernel_gradient(x, cotangent, num_inputs)


contract.defvjp(_forward, _backward)


def input_gradient(kernel: Array, cotangent: Array, num_inputs: int) -> Array:
    """Gradient of the input from the cotangent of the output."""
    num_outputs = kernel.ndim - num_inputs
    cotangent_axes = tuple(range(cotangent.ndim - num_outputs, cotangent.ndim))
    kernel_axes = tuple(range(num_inputs, kernel.ndim))
    return jax.lax.dot_general(cotangent, kernel, ((cotangent_axes, kernel_axes), ((), ())))


def kernel_gradient(x: Array, cotangent: Array, num_inputs: int, dtype: DTypeLike | None = None) -> Array:
    """Gradient of the kernel, summed over all rows; dtype: of the sum, by default that of the operands."""
    row_axes = (tuple(range(x.ndim - num_inputs)),) * 2
    return jax.lax.dot_general(x, cotangent, (row_axes, ((), ())), preferred_element_type=dtype)
