"""Reverse cumulative sums: exact where floats are, as accurate as they allow elsewhere, at any length."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shiq_jax.objectives.cumulative import reverse_cumsum


@pytest.mark.parametrize("length", [0, 1, 31, 32, 33, 1024, 1025, 5000])
def test_sums_of_integers_and_their_gradients_are_exact(length):
    random = np.random.default_rng(length)
    x, weights = random.integers(-99, 99, size=(2, length)).astype(np.float32)
    found, transpose = jax.vjp(jax.jit(reverse_cumsum), x)
    np.testing.assert_array_equal(found, np.cumsum(x[::-1])[::-1])
    np.testing.assert_array_equal(transpose(jnp.asarray(weights))[0], np.cumsum(weights))


def test_rounding_does_not_grow_with_the_length():
    """Relative to the sum of magnitudes, what one rounding of a partial sum can cost; both ways, in batches."""
    x = np.random.default_rng(0).normal(size=(3, 20_000)).astype(np.float32)
    scale = np.cumsum(np.abs(x[:, ::-1]).astype(np.float64), axis=1)[:, ::-1]
    exact = np.cumsum(x[:, ::-1].astype(np.float64), axis=1)[:, ::-1]
    found, transpose = jax.vjp(jax.jit(jax.vmap(reverse_cumsum)), x)
    assert found.dtype == np.float32 and np.max(np.abs(found - exact) / scale) < 1e-6
    (back,) = transpose(jnp.asarray(x[:, ::-1]))
    assert np.max(np.abs(back[:, ::-1] - exact) / scale) < 1e-6
