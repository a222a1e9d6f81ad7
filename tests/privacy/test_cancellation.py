"""Units whose parts cancel, so that their gradient is as long as the rounding of what it is summed up from."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shiq_jax.models import ghost_norms
from shiq_jax.privacy import AutoS, AutoV, FlatClip, Groupwise, clipped_sum

# (operation, input features, shape of the parameter, output features); long enough for Gram norms, or not.
OPERATIONS = {
    "gram": (ghost_norms.product(1), 64, (64, 48), 48),
    "matrix": (ghost_norms.product(1), 4, (4, 5), 5),
    "shift": (ghost_norms.SHIFT, 32, (32,), 32),
    "scale": (ghost_norms.SCALE, 32, (32,), 32),
}
RULES = (AutoV(1.0), AutoS(1.0), FlatClip(1e-3))


def unit(name: str, seed: int, size: float, left: float):
    """Inputs and slopes of eight places, the second half of which takes back the first but for a part `left`."""
    _, inputs, _, outputs = OPERATIONS[name]
    rng = np.random.default_rng(seed)
    x, s = rng.normal(size=(4, inputs)), rng.normal(size=(4, outputs))
    x, s = np.concatenate([x, x]), np.concatenate([s, -(1 + left) * s])
    order = rng.permutation(8)
    return {"x": np.float32(size * x[order])[None], "s": np.float32(s[order])[None]}


@functools.cache
def summing(name: str, clip, method: str):
    """A compiled program for the clipped sum, and the norms, of a batch."""
    operation, _, shape, _ = OPERATIONS[name]
    params = {"w": jnp.zeros(shape, jnp.float32)}

    def losses(params, batch, tracker):
        return jnp.sum(ghost_norms.apply(operation, batch["x"], params["w"], tracker) * batch["s"], axis=(1, 2))

    return jax.jit(lambda batch: clipped_sum(losses, params, batch, clip=clip, method=method)[:2])


@pytest.mark.parametrize("name", OPERATIONS)
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**16), size=st.sampled_from([1e-6, 1.0, 1e6]), left=st.sampled_from([0.0, 1e-7, 1e-5, 1e-3])
)  # fmt: skip
def test_no_unit_moves_the_sum_further_than_it_may(name, seed, size, left):
    batch = unit(name, seed, size, left)
    for rule in RULES:
        for method in ("ghost", "bk", "group"):
            clip = Groupwise(rule, 1) if method == "group" else rule
            total = summing(name, clip, method)(batch)[0]
            assert np.linalg.norm(total["w"]) <= clip.sensitivity * (1 + 1e-4), (rule, method)


@pytest.mark.parametrize("name", OPERATIONS)
def test_norms_are_exact_where_nothing_cancels_and_too_large_where_much_does(name):
    parts = {"gram": "ti,to->io", "matrix": "ti,to->io", "shift": "ti,to->o", "scale": "to,to->o"}[name]
    for left in (1.0, 1e-3, 0.0):
        batch = unit(name, 1, 1.0, left)
        x, s = np.float64(batch["x"][0]), np.float64(batch["s"][0])
        true = np.linalg.norm(np.einsum(parts, np.ones((8, 1)) if name == "shift" else x, s))
        (norm,) = summing(name, AutoS(1.0), "ghost")(batch)[1]
        assert norm > 0 and norm >= true * (1 - 1e-6)
        if left == 1:
            assert norm <= true * (1 + 1e-5)
