"""Reverse cumulative sums: exact for integers, accurate for floats, at any length."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shiq_jax.objectives.cumulative import reverse_cumsum


@pytest.mark.parametrize("length", [0, 1, 31, 32, 33, 1024, 1025, 5000])
def test_integer_sums_and_gradients_are_exact(length):
    random = np.random.default_rng(length)
    x, weights = random.integers(-99, 99, size=(2, length)).astype(np.float32)
    sums, vjp = jax.vjp(jax.jit(reverse_cumsum), x)
    np.testing.assert_array_equal(sums, np.cumsum(x[::-1])[::-1])
    np.testing.assert_array_equal(vjp(jnp.asarray(weights))[0], np.cumsum(weights))


def test_rounding_error_does_not_grow_with_length():
    """The error relative to the sum of magnitudes stays near that of one rounding, forward and backward, under vmap."""
    x = np.random.default_rng(0).normal(size=(3, 20_000)).astype(np.float32)
    scale = np.cumsum(np.abs(x[:, ::-1]).astype(np.float64), axis=1)[:, ::-1]
    exact = np.cumsum(x[:, ::-1].astype(np.float64), axis=1)[:, ::-1]
    sums, vjp = jax.vjp(jax.jit(jax.vmap(reverse_cumsum)), x)
    assert sums.dtype == np.float32 and np.max(np.abs(sums - exact) / scale) < 1e-6
    (gradient,) = vjp(jnp.asarray(x[:, ::-1]))
    assert np.max(np.abs(gradient[:, ::-1] - exact) / scale) < 1e-6
