"""The policy gradient on a buffer: its gradient in closed form, and where it is that of reward less KL."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shiq_jax.objectives import reinforce_loss

BETA = 0.3


def test_its_gradient_is_the_advantage_over_the_other_answers():
    rng = np.random.default_rng(0)
    logratios, returns = rng.normal(size=(2, 5))
    real = np.array([True, True, False, True, True])
    found = jax.grad(lambda x: reinforce_loss(x, returns, real, beta=BETA).sum())(logratios)
    gains = (returns - BETA * logratios)[real]
    wanted = np.zeros(5)
    wanted[real] = [np.delete(gains, place).mean() - gain for place, gain in enumerate(gains)]
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_on_samples_of_the_policy_it_is_unbiased():
    """The mean over all pairs of answers, each as likely as the policy makes it, is the gradient of reward less KL."""
    rng = np.random.default_rng(1)
    logits, reference, rewards = rng.normal(size=(3, 4))

    def worth(logits):
        logp = jax.nn.log_softmax(logits)
        return jnp.sum(jnp.exp(logp) * (rewards - BETA * (logp - jax.nn.log_softmax(reference))))

    first, second = np.meshgrid(np.arange(4), np.arange(4), indexing="ij")
    pairs = np.stack([first.ravel(), second.ravel()], axis=1)
    likely = np.asarray(jax.nn.softmax(logits))
    weights = likely[pairs[:, 0]] * likely[pairs[:, 1]]

    def loss(logits):
        logratios = (jax.nn.log_softmax(logits) - jax.nn.log_softmax(reference))[pairs]
        losses = reinforce_loss(logratios, rewards[pairs], np.ones(pairs.shape, bool), beta=BETA)
        return jnp.sum(weights * losses.mean(axis=1))

    np.testing.assert_allclose(jax.grad(loss)(logits), -jax.grad(worth)(logits), rtol=1e-4, atol=1e-6)


def test_an_answer_alone_has_nothing_to_be_compared_with():
    found = jax.grad(lambda x: reinforce_loss(x, jnp.ones(3), jnp.array([False, True, False]), beta=BETA).sum())
    np.testing.assert_allclose(found(jnp.zeros(3)), [0, -1, 0])


def test_shapes_that_disagree_are_refused():
    with pytest.raises(ValueError, match="returns"):
        reinforce_loss(jnp.zeros(3), jnp.zeros(2), jnp.ones(3, bool), beta=BETA)
    with pytest.raises(ValueError, match="beta"):
        reinforce_loss(jnp.zeros(3), jnp.zeros(3), jnp.ones(3, bool), beta=0.0)
