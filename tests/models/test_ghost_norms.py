"""Norm rules of biases and scales for every rank of inputs and parameters, against gradients of single rows."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shiq_jax.models import ghost_norms
from shiq_jax.privacy import FlatClip, clipped_sum

OPERATIONS = {"bias": ghost_norms.BIAS, "scale": ghost_norms.SCALE}


@settings(max_examples=12, deadline=None)
@given(
    name=st.sampled_from(sorted(OPERATIONS)),
    sizes=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    parameter_rank=st.integers(0, 3),
    seed=st.integers(0, 99),
)
def test_norms_match_gradients_of_single_rows(name, sizes, parameter_rank, seed):
    rng = np.random.default_rng(seed)
    shape = tuple(sizes)[len(sizes) - min(parameter_rank, len(sizes)) :]
    parameter = jnp.asarray(rng.normal(size=shape), jnp.float32)
    batch = {name: rng.normal(size=(4, *sizes)).astype(np.float32) for name in ("x", "weight")}

    def losses(parameter, batch, tracker=None):
        out = ghost_norms.apply(OPERATIONS[name], batch["x"], parameter, tracker)
        return jnp.sum((out**2 * batch["weight"]).reshape(len(out), -1), axis=1)

    expected, expected_norms, _ = clipped_sum(losses, parameter, batch, clip=FlatClip(0.5), method="vmap")
    for method in ("ghost", "bk"):
        total, norms, _ = clipped_sum(losses, parameter, batch, clip=FlatClip(0.5), method=method)
        np.testing.assert_allclose(norms, expected_norms, rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(total, expected, rtol=1e-3, atol=1e-5)


def test_bias_without_positions():
    """The contributions of two features must not be summed before the norm is taken."""
    x = np.array([[3.0, -3.0]], np.float32)

    def losses(bias, batch, tracker=None):
        return jnp.sum(ghost_norms.apply(ghost_norms.BIAS, batch, bias, tracker) ** 2, axis=1)

    for method in ("vmap", "ghost", "bk"):
        norms = clipped_sum(losses, jnp.zeros(2), x, clip=FlatClip(1.0), method=method)[1]
        np.testing.assert_allclose(norms, np.linalg.norm(2 * x, axis=1), rtol=1e-3)


@pytest.mark.parametrize("shape", [(1, 3), (1,), (2, 4, 3)])
def test_parameters_are_not_broadcast(shape):
    with pytest.raises(AssertionError):
        ghost_norms.apply(ghost_norms.SCALE, jnp.ones((2, 4, 3)), jnp.ones(shape), None)
