"""REINFORCE on stored answers: closed-form gradient, and unbiasedness on samples of the policy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shiq_jax.objectives import reinforce_loss

BETA = 0.3


def test_gradient_is_the_leave_one_out_advantage():
    rng = np.random.default_rng(0)
    logratios, returns = rng.normal(size=(2, 5))
    real = np.array([True, True, False, True, True])
    gradient = jax.grad(lambda x: reinforce_loss(x, returns, real, beta=BETA).sum())(logratios)
    soft_returns = (returns - BETA * logratios)[real]
    expected = np.zeros(5)
    expected[real] = [np.delete(soft_returns, i).mean() - value for i, value in enumerate(soft_returns)]
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-6)


def test_gradient_is_unbiased_on_policy_samples():
    """The expectation over pairs of answers from the policy is the gradient of expected reward minus beta KL."""
    rng = np.random.default_rng(1)
    logits, reference, rewards = rng.normal(size=(3, 4))

    def regularized_reward(logits):
        logp = jax.nn.log_softmax(logits)
        return jnp.sum(jnp.exp(logp) * (rewards - BETA * (logp - jax.nn.log_softmax(reference))))

    first, second = np.meshgrid(np.arange(4), np.arange(4), indexing="ij")
    pairs = np.stack([first.ravel(), second.ravel()], axis=1)
    probabilities = np.asarray(jax.nn.softmax(logits))
    weights = probabilities[pairs[:, 0]] * probabilities[pairs[:, 1]]

    def loss(logits):
        logratios = (jax.nn.log_softmax(logits) - jax.nn.log_softmax(reference))[pairs]
        losses = reinforce_loss(logratios, rewards[pairs], np.ones(pairs.shape, bool), beta=BETA)
        return jnp.sum(weights * losses.mean(axis=1))

    np.testing.assert_allclose(jax.grad(loss)(logits), -jax.grad(regularized_reward)(logits), rtol=1e-4, atol=1e-6)


def test_single_answer_has_no_baseline():
    gradient = jax.grad(lambda x: reinforce_loss(x, jnp.ones(3), jnp.array([False, True, False]), beta=BETA).sum())
    np.testing.assert_allclose(gradient(jnp.zeros(3)), [0, -1, 0])


def test_invalid_arguments_are_rejected():
    with pytest.raises(ValueError, match="returns"):
        reinforce_loss(jnp.zeros(3), jnp.zeros(2), jnp.ones(3, bool), beta=BETA)
    with pytest.raises(ValueError, match="beta"):
        reinforce_loss(jnp.zeros(3), jnp.zeros(3), jnp.ones(3, bool), beta=0.0)
