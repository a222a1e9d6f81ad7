"""Losses on pairs and single completions: published numbers, symmetries, gradients, limits and Bellman residuals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from shiq_jax.objectives import TokenStats, bellman_residuals, dpo_loss, kto, preference, reference_free

SMOOTHED = {"label_smoothing": 0.1}
# Name -> (options, loss at log-ratios 0 and 0, loss at 0.8 and -0.4), with beta = 0.5.
LOGRATIO_LOSSES = {
    "dpo": ({}, np.log(2), 0.437488),
    "dpo smoothed": (SMOOTHED, np.log(2), 0.497488),
    "robust": (SMOOTHED, np.log(2), 0.362488),
    "dpop": ({"penalty": 7.0}, np.log(2), 0.437488),
    "hinge": ({}, 1.0, 0.4),
    "ipo": ({}, 1.0, 0.04),
    "exo": (SMOOTHED, -np.log(4 * 0.1 * 0.9) / 2, 0.233839),
    "nca": ({}, 2 * np.log(2), 1.268592),
    "bco": ({}, 2 * np.log(2), 1.111154),
    "sppo_hard": ({}, 2.0, 0.4),
    "apo_zero": ({}, 1.0, 0.851478),
    "apo_down": ({}, 1.0, 0.953031),
    "discopop": ({"tau": 0.05}, np.log(2) / 2 + 0.5, 0.548811),
}


def loss_of_logratios(name):
    """A loss with bound options, as a function of both log-ratios."""
    loss = getattr(preference, f"{name.split()[0]}_loss")
    return lambda w, l: loss(w, l, beta=0.5, **LOGRATIO_LOSSES[name][0])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", LOGRATIO_LOSSES)
def test_values_match_published_formulas(name, dtype):
    _, at_zero, expected = LOGRATIO_LOSSES[name]
    with jax.enable_x64(dtype == "float64"):
        actual = loss_of_logratios(name)(jnp.asarray([0.0, 0.8], dtype), jnp.asarray([0.0, -0.4], dtype))
        assert actual.dtype == dtype
        np.testing.assert_allclose(actual, (at_zero, expected), atol=2e-6)


def test_length_normalized_losses(x64):
    lengths = {"chosen_length": 4, "rejected_length": 2}
    np.testing.assert_allclose(preference.ipo_loss(0.8, -0.4, **lengths, beta=0.5), 0.36, atol=1e-9)
    np.testing.assert_allclose(preference.ipo_loss(0.0, 0.0, **lengths, beta=0.1), 25.0)
    actual = preference.dpo_norm_loss(0.8, -0.4, 4, 2, beta=0.5)
    np.testing.assert_allclose(actual, dpo_loss(0.2, -0.2, beta=0.5))
    actual = reference_free.cpo_loss(-6.0, -5.0, beta=0.5, alpha=0.0)
    np.testing.assert_allclose(actual, 0.974077, atol=2e-6)
    np.testing.assert_allclose(reference_free.cpo_loss(-6.0, -5.0, beta=0.5) - actual, 6.0)
    np.testing.assert_allclose(reference_free.simpo_loss(-6.0, -5.0, 4, 2, beta=0.5, margin=0.3), 0.598139, atol=2e-6)
    np.testing.assert_allclose(reference_free.orpo_loss(-6.0, -5.0, 4, 2, beta=0.5), 1.635529, atol=2e-6)


def test_unpaired_losses(x64):
    labels = np.array([True, False])
    actual = kto.kto_loss(np.array([0.8, -0.4]), labels, kl=0.1, beta=0.5)
    np.testing.assert_allclose(actual, (0.413382, 0.437823), atol=2e-6)
    np.testing.assert_allclose(kto.kto_loss(np.zeros(2), labels, kl=0.0, beta=0.5), 0.5)
    weighted = kto.kto_loss(np.zeros(2), labels, kl=0.0, beta=0.5, desirable_weight=3.0, undesirable_weight=5.0)
    np.testing.assert_allclose(weighted, (1.5, 2.5))
    actual = kto.apo_zero_unpaired_loss(np.array([0.8, -0.4]), labels, beta=0.5)
    np.testing.assert_allclose(actual, (0.401312, 0.450166), atol=2e-6)
    assert jax.grad(lambda kl: kto.kto_loss(0.8, True, kl=kl, beta=0.5))(0.1) == 0


def test_divergence_scores(x64):
    score = preference.divergence_score
    np.testing.assert_allclose(score(0.8, kind="forward_kl"), -0.449329, atol=2e-6)
    np.testing.assert_allclose(score(0.8, kind="js_divergence"), -0.371101, atol=2e-6)
    np.testing.assert_allclose(score(0.8, kind="alpha_divergence", alpha=2.0), 1.225541, atol=2e-6)
    assert score(0.8, kind="reverse_kl") == score(0.8, kind="alpha_divergence", alpha=1.0) == 0.8
    # As alpha tends to 1, differences of scores tend to differences of log-ratios.
    scores = [score(u, kind="alpha_divergence", alpha=1 + 1e-7) for u in (0.8, -0.4)]
    np.testing.assert_allclose(scores[0] - scores[1], 1.2, atol=1e-6)


@functools.cache
def compiled(name):
    """Compiled loss and gradient, cached across hypothesis examples."""
    loss = loss_of_logratios(name)
    return jax.jit(loss), jax.jit(jax.grad(loss, (0, 1)))


@pytest.mark.parametrize("name", LOGRATIO_LOSSES)
@given(w=st.floats(-20, 20), l=st.floats(-20, 20))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_gradients_match_finite_differences(name, w, l):
    loss, gradient = compiled(name)
    # Skip the kinks of hinge and DPOP.
    assume(abs(0.5 * (w - l) - 1) > 1e-3 and abs(w) > 1e-3)
    with jax.enable_x64(True):
        step = 1e-5
        differences = (loss(w + step, l) - loss(w - step, l), loss(w, l + step) - loss(w, l - step))
        np.testing.assert_allclose(gradient(w, l), np.asarray(differences) / (2 * step), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", LOGRATIO_LOSSES)
def test_extreme_logratios_stay_finite(name):
    values = jnp.array([-1e4, -60.0, 60.0, 1e4])
    chosen, rejected = (x.ravel() for x in jnp.meshgrid(values, values))
    actual = jax.vmap(jax.value_and_grad(loss_of_logratios(name), (0, 1)))(chosen, rejected)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(actual))


def test_orpo_stays_finite_near_probability_one():
    def loss(logp):
        return reference_free.orpo_loss(logp, -3.0, 4, 4, beta=0.1)

    actual = jax.vmap(jax.value_and_grad(loss))(jnp.array([0.0, -1e-12, -1e-3, -200.0, -1e4]))
    assert all(np.isfinite(x).all() for x in actual)


def test_ipo_and_sppo_are_squared_residuals(x64):
    """IPO: pair residual with reward difference 1/2. SPPO: single residuals with rewards 1/2 and -1/2."""
    random, beta = np.random.default_rng(3), 0.7
    policy, reference = (TokenStats(*random.normal(size=(2, 2, 5))) for _ in "pr")
    mask = np.ones(5, bool)
    sums = (policy.logp - reference.logp).sum(1)

    def residual(k, final_reward):
        rewards = np.append(np.zeros(4), final_reward)
        stats = jax.tree.map(lambda x: x[k], (policy, reference))
        return bellman_residuals(*stats, rewards, mask, beta=beta, horizon="trajectory", value="none")[0]

    pair = residual(0, 0.5) - residual(1, 0.0)
    np.testing.assert_allclose(pair**2, beta**2 * preference.ipo_loss(*sums, beta=beta), atol=1e-10)
    total = residual(0, 0.5) ** 2 + residual(1, -0.5) ** 2
    np.testing.assert_allclose(total, beta**2 * preference.sppo_hard_loss(*sums, beta=beta), atol=1e-10)


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: preference.exo_loss(0.0, 0.0, beta=0.1, label_smoothing=0.0),
            "label_smoothing is 0.0 but must be a pos",
        ),
        (lambda: preference.discopop_loss(0.0, 0.0, beta=0.1, tau=0.0), "tau is 0.0"),
        (
            lambda: preference.hinge_loss(np.zeros(2), np.zeros(3), beta=0.1),
            r"chosen_logratio has shape \(2,\) but rej",
        ),
        (lambda: preference.divergence_score(0.0, kind="kl"), "kind is 'kl' but must be one of 'reverse_kl'"),
        (
            lambda: kto.kto_loss(np.zeros(2), np.ones(3), kl=0.0, beta=0.1),
            r"logratio has shape \(2,\) but desirable",
        ),
        (lambda: reference_free.simpo_loss(0.0, 0.0, 1, 1, beta=0.0), "beta is 0.0"),
    ],
)
def test_invalid_arguments_are_rejected(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_dpo_hand_computed_values(dtype):
    with jax.enable_x64(dtype == "float64"):
        chosen, rejected = jnp.asarray([0.8, 0.0], dtype), jnp.asarray([-0.4, 0.0], dtype)
        actual = dpo_loss(chosen, rejected, beta=0.5)
        assert actual.dtype == dtype
        np.testing.assert_allclose(actual, (0.437488, np.log(2)), atol=2e-6)
        smooth = dpo_loss(chosen, rejected, beta=0.5, label_smoothing=0.1)
        np.testing.assert_allclose(smooth, (0.497488, np.log(2)), atol=2e-6)


@given(w=st.floats(-30, 30), l=st.floats(-30, 30), smoothing=st.floats(0, 1))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_dpo_swapping_the_pair_flips_the_label(w, l, smoothing):
    with jax.enable_x64(True):
        smoothing = jnp.asarray(smoothing)
        loss = jax.jit(dpo_loss)(w, l, beta=0.5, label_smoothing=smoothing)
        swapped = jax.jit(dpo_loss)(l, w, beta=0.5, label_smoothing=1 - smoothing)
        np.testing.assert_allclose(loss, swapped, atol=1e-10)


def test_dpo_gradient(x64):
    for smoothing in (0.0, 0.2):
        loss, (chosen_gradient, rejected_gradient) = jax.value_and_grad(
            lambda w, l: dpo_loss(w, l, beta=0.5, label_smoothing=smoothing), (0, 1)
        )(0.8, -0.4)
        probability = 1 / (1 + np.exp(-0.5 * 1.2))
        np.testing.assert_allclose(chosen_gradient, -0.5 * (1 - smoothing - probability), atol=1e-12)
        assert chosen_gradient == -rejected_gradient
        cross_entropy = -(1 - smoothing) * np.log(probability) - smoothing * np.log(1 - probability)
        np.testing.assert_allclose(loss, cross_entropy, atol=1e-12)


def test_dpo_is_logistic_loss_of_trajectory_residuals(x64):
    """Without rewards and discount, beta times the log-ratio is the value of the prompt minus the first residual."""
    random = np.random.default_rng(0)
    pair = [[TokenStats(*random.normal(size=(2, 6))) for _ in "pr"] for _ in "wl"]
    for policy, reference in pair[1:]:
        policy.lse[0], reference.lse[0] = pair[0][0].lse[0], pair[0][1].lse[0]
    mask = np.ones(6, bool)
    first = [bellman_residuals(p, r, np.zeros(6), mask, beta=0.5, horizon="trajectory")[0] for p, r in pair]
    actual = dpo_loss(*(np.sum(p.logp - r.logp) for p, r in pair), beta=0.5)
    np.testing.assert_allclose(actual, np.log1p(np.exp(-(first[1] - first[0]))), atol=1e-10)


def test_dpo_extreme_margins_stay_finite():
    value, gradient = jax.vmap(jax.value_and_grad(lambda w: dpo_loss(w, 0.0, beta=1.0)))(jnp.array([-1e4, 1e4]))
    np.testing.assert_allclose(value, (1e4, 0), atol=1e-6)
    np.testing.assert_allclose(gradient, (-1, 0), atol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dpo_casts_low_precision_inputs_to_float32(dtype):
    chosen, rejected = jnp.asarray(12.7, dtype), jnp.asarray(12.3, dtype)
    actual = jax.jit(lambda w, l: dpo_loss(w, l, beta=0.1))(chosen, rejected)
    assert actual.dtype == jnp.float32
    assert actual == dpo_loss(chosen.astype(jnp.float32), rejected.astype(jnp.float32), beta=0.1)
    assert jax.grad(lambda w: dpo_loss(w, rejected, beta=0.1))(chosen).dtype == dtype


def test_dpo_vmap_matches_loop():
    chosen, rejected = np.random.default_rng(1).normal(size=(2, 5))
    actual = jax.vmap(lambda w, l: dpo_loss(w, l, beta=0.3, label_smoothing=0.1))(chosen, rejected)
    expected = [dpo_loss(w, l, beta=0.3, label_smoothing=0.1) for w, l in zip(chosen, rejected)]
    np.testing.assert_allclose(actual, expected, rtol=1e-6)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"beta": -1.0}, "beta is -1.0"),
        ({"label_smoothing": 0.5}, "label_smoothing is 0.5"),
        ({"label_smoothing": -0.1}, "label_smoothing is -0.1"),
        ({"rejected_logratio": np.zeros(3)}, r"has shape \(2,\) but rejected_logratio has shape \(3,\)"),
    ],
)
def test_invalid_dpo_arguments_are_rejected(options, message):
    arguments = {"chosen_logratio": np.zeros(2), "rejected_logratio": np.zeros(2), "beta": 0.1} | options
    with pytest.raises(ValueError, match=message):
        dpo_loss(**arguments)
