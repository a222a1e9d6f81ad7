"""The SFT loss is the negative log-likelihood of the actions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shiq_jax.objectives import TokenStats, sft_loss, token_stats_from_logits


def test_loss_is_the_negative_log_likelihood():
    logits, tokens = np.random.default_rng(0).normal(size=(6, 4)), np.array([3, 0, 1, 1, 2, 0])
    mask = np.array([0, 1, 1, 0, 1, 0])

    def loss(logits):
        return sft_loss(token_stats_from_logits(logits, tokens), mask)

    value, gradient = jax.jit(jax.value_and_grad(loss))(logits)
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(np.exp(-value), np.prod(probabilities[[1, 2, 4], [0, 1, 2]]), rtol=1e-5)
    np.testing.assert_allclose(gradient, (probabilities - np.eye(4)[tokens]) * mask[:, None], atol=1e-6)


def test_masked_positions_do_not_affect_loss_or_gradient():
    logp, mask = np.array([-1.0, np.nan, -2.0, -np.inf]), np.array([True, False, True, False])
    value, gradient = jax.value_and_grad(lambda x: sft_loss(TokenStats(x, None), mask))(jnp.asarray(logp))
    assert value == 3
    np.testing.assert_array_equal(gradient, (-1, 0, -1, 0))


def test_vmap_empty_sequences_and_bfloat16():
    logp = jnp.asarray([[-1.5, -2.0], [-3.0, -4.0]], jnp.bfloat16)
    mask = np.array([[True, True], [False, False]])
    losses = jax.vmap(lambda logp, mask: sft_loss(TokenStats(logp, logp), mask))(logp, mask)
    assert losses.dtype == jnp.float32
    np.testing.assert_array_equal(losses, (3.5, 0))


def test_mismatched_shapes_are_rejected():
    with pytest.raises(ValueError, match=r"policy.logp has shape \(3,\) but action_mask has shape \(2,\)"):
        sft_loss(TokenStats(jnp.zeros(3), jnp.zeros(3)), np.ones(2, bool))
