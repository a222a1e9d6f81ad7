"""The DPO loss: published numbers, its symmetries, its derivative, and what it is in terms of residuals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shiq_jax.objectives import TokenStats, bellman_residuals, dpo_loss


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_hand_computed_numbers(dtype):
    with jax.enable_x64(dtype == "float64"):
        chosen, rejected = jnp.asarray([0.8, 0.0], dtype), jnp.asarray([-0.4, 0.0], dtype)
        found = dpo_loss(chosen, rejected, beta=0.5)
        assert found.dtype == dtype
        np.testing.assert_allclose(found, (0.437488, np.log(2)), atol=2e-6)
        smooth = dpo_loss(chosen, rejected, beta=0.5, label_smoothing=0.1)
        np.testing.assert_allclose(smooth, (0.497488, np.log(2)), atol=2e-6)


@given(w=st.floats(-30, 30), l=st.floats(-30, 30), smoothing=st.floats(0, 1))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_swapping_the_pair_swaps_the_labels(w, l, smoothing):
    with jax.enable_x64(True):
        smoothing = jnp.asarray(smoothing)
        loss = jax.jit(dpo_loss)(w, l, beta=0.5, label_smoothing=smoothing)
        swapped = jax.jit(dpo_loss)(l, w, beta=0.5, label_smoothing=1 - smoothing)
        np.testing.assert_allclose(loss, swapped, atol=1e-10)


def test_gradient(x64):
    for smoothing in (0.0, 0.2):
        loss, (to_chosen, to_rejected) = jax.value_and_grad(
            lambda w, l: dpo_loss(w, l, beta=0.5, label_smoothing=smoothing), (0, 1)
        )(0.8, -0.4)
        probability = 1 / (1 + np.exp(-0.5 * 1.2))
        np.testing.assert_allclose(to_chosen, -0.5 * (1 - smoothing - probability), atol=1e-12)
        assert to_chosen == -to_rejected
        entropy_form = -(1 - smoothing) * np.log(probability) - smoothing * np.log(1 - probability)
        np.testing.assert_allclose(loss, entropy_form, atol=1e-12)


def test_a_logistic_fit_of_first_residuals(x64):
    """Without rewards and discount, beta times the log-ratio is the value of the prompt less the first residual."""
    random = np.random.default_rng(0)
    pair = [[TokenStats(*random.normal(size=(2, 6))) for _ in "pr"] for _ in "wl"]
    for policy, reference in pair[1:]:
        policy.lse[0], reference.lse[0] = pair[0][0].lse[0], pair[0][1].lse[0]
    mask = np.ones(6, bool)
    first = [bellman_residuals(p, r, np.zeros(6), mask, beta=0.5, horizon="trajectory")[0] for p, r in pair]
    found = dpo_loss(*(np.sum(p.logp - r.logp) for p, r in pair), beta=0.5)
    np.testing.assert_allclose(found, np.log1p(np.exp(-(first[1] - first[0]))), atol=1e-10)


def test_extreme_margins_stay_finite():
    value, gradient = jax.vmap(jax.value_and_grad(lambda w: dpo_loss(w, 0.0, beta=1.0)))(jnp.array([-1e4, 1e4]))
    np.testing.assert_allclose(value, (1e4, 0), atol=1e-6)
    np.testing.assert_allclose(gradient, (-1, 0), atol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_inputs_are_widened_first(dtype):
    chosen, rejected = jnp.asarray(12.7, dtype), jnp.asarray(12.3, dtype)
    found = jax.jit(lambda w, l: dpo_loss(w, l, beta=0.1))(chosen, rejected)
    assert found.dtype == jnp.float32
    assert found == dpo_loss(chosen.astype(jnp.float32), rejected.astype(jnp.float32), beta=0.1)
    assert jax.grad(lambda w: dpo_loss(w, rejected, beta=0.1))(chosen).dtype == dtype


def test_batches_by_vmap():
    chosen, rejected = np.random.default_rng(1).normal(size=(2, 5))
    found = jax.vmap(lambda w, l: dpo_loss(w, l, beta=0.3, label_smoothing=0.1))(chosen, rejected)
    each = [dpo_loss(w, l, beta=0.3, label_smoothing=0.1) for w, l in zip(chosen, rejected)]
    np.testing.assert_allclose(found, each, rtol=1e-6)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"beta": -1.0}, "beta is -1.0"),
        ({"label_smoothing": 0.5}, "label_smoothing is 0.5"),
        ({"label_smoothing": -0.1}, "label_smoothing is -0.1"),
        ({"rejected_logratio": np.zeros(3)}, r"has shape \(2,\) but rejected_logratio has shape \(3,\)"),
    ],
)
def test_arguments_out_of_range(options, words):
    arguments = {"chosen_logratio": np.zeros(2), "rejected_logratio": np.zeros(2), "beta": 0.1} | options
    with pytest.raises(ValueError, match=words):
        dpo_loss(**arguments)
