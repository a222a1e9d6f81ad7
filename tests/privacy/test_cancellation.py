"""Sensitivity of units whose gradient terms cancel, so that rounding errors dominate its norm."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shiq_jax.models import ghost_norms
from shiq_jax.privacy import AutoS, AutoV, FlatClip, Groupwise, clipped_sum

# (operation, input features, parameter shape, output features); norms by Gram matrices or by the gradient itself.
OPERATIONS = {
    "gram": (ghost_norms.product(1), 64, (64, 48), 48),
    "matrix": (ghost_norms.product(1), 4, (4, 5), 5),
    "bias": (ghost_norms.BIAS, 32, (32,), 32),
    "scale": (ghost_norms.SCALE, 32, (32,), 32),
}
RULES = (AutoV(1.0), AutoS(1.0), FlatClip(1e-3))


def make_unit(name: str, seed: int, scale: float, residual: float):
    """Inputs and output cotangents of eight tokens; the last four cancel the first four up to a share `residual`."""
    _, inputs, _, outputs = OPERATIONS[name]
    rng = np.random.default_rng(seed)
    x, s = rng.normal(size=(4, inputs)), rng.normal(size=(4, outputs))
    x, s = np.concatenate([x, x]), np.concatenate([s, -(1 + residual) * s])
    order = rng.permutation(8)
    return {"x": np.float32(scale * x[order])[None], "s": np.float32(s[order])[None]}


@functools.cache
def compiled_sum(name: str, clip, method: str):
    """Compile the clipped sum and the norms of a batch."""
    operation, _, shape, _ = OPERATIONS[name]
    params = {"w": jnp.zeros(shape, jnp.float32)}

    def losses(params, batch, tracker):
        return jnp.sum(ghost_norms.apply(operation, batch["x"], params["w"], tracker) * batch["s"], axis=(1, 2))

    return jax.jit(lambda batch: clipped_sum(losses, params, batch, clip=clip, method=method)[:2])


@pytest.mark.parametrize("name", OPERATIONS)
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    scale=st.sampled_from([1e-6, 1.0, 1e6]),
    residual=st.sampled_from([0.0, 1e-7, 1e-5, 1e-3]),
)
def test_unit_contribution_is_within_sensitivity(name, seed, scale, residual):
    batch = make_unit(name, seed, scale, residual)
    for rule in RULES:
        for method in ("ghost", "bk", "group"):
            clip = Groupwise(rule, 1) if method == "group" else rule
            total = compiled_sum(name, clip, method)(batch)[0]
            assert np.linalg.norm(total["w"]) <= clip.sensitivity * (1 + 1e-4), (rule, method)


@pytest.mark.parametrize("name", OPERATIONS)
def test_norms_are_exact_without_cancellation_and_never_too_small(name):
    subscripts = {"gram": "ti,to->io", "matrix": "ti,to->io", "bias": "ti,to->o", "scale": "to,to->o"}[name]
    for residual in (1.0, 1e-3, 0.0):
        batch = make_unit(name, 1, 1.0, residual)
        x, s = np.float64(batch["x"][0]), np.float64(batch["s"][0])
        expected = np.linalg.norm(np.einsum(subscripts, np.ones((8, 1)) if name == "bias" else x, s))
        (norm,) = compiled_sum(name, AutoS(1.0), "ghost")(batch)[1]
        assert norm > 0 and norm >= expected * (1 - 1e-6)
        if residual == 1:
            assert norm <= expected * (1 + 1e-5)
