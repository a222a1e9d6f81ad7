"""Categorical sampling: frequencies match the probabilities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from shiq_jax.rollout.categorical import categorical


@pytest.mark.parametrize("size", [3, 128, 300, 1000])
def test_frequencies_match_probabilities(size):
    rng = np.random.default_rng(size)
    logits = jnp.asarray(rng.normal(size=size) * 2)
    samples = jax.jit(jax.vmap(categorical, (0, None)))(jax.random.split(jax.random.key(1), 200_000), logits)
    expected = np.asarray(jax.nn.softmax(logits), np.float64) * len(samples)
    common = expected > 20
    counts = np.bincount(samples, minlength=size)
    pooled_counts = np.append(counts[common], counts[~common].sum())
    pooled_expected = np.append(expected[common], expected[~common].sum())
    counts, expected = pooled_counts[pooled_expected > 0], pooled_expected[pooled_expected > 0]
    assert stats.chisquare(counts, expected * pooled_counts.sum() / expected.sum()).pvalue > 1e-3


def test_tokens_without_mass_are_never_sampled():
    logits = jnp.where(jnp.arange(700) % 7 == 3, 0.0, -jnp.inf).at[:200].set(-jnp.inf)
    samples = jax.jit(jax.vmap(categorical, (0, None)))(jax.random.split(jax.random.key(0), 50_000), logits)
    assert (np.asarray(samples) % 7 == 3).all() and samples.min() >= 200
    assert len(np.unique(samples)) == 71 and samples.max() < 700


def test_single_token_with_mass_is_always_sampled():
    logits = jnp.full(500, -jnp.inf).at[499].set(-1e4)
    samples = jax.jit(jax.vmap(categorical, (0, None)))(jax.random.split(jax.random.key(0), 1000), logits)
    assert (np.asarray(samples) == 499).all()


def test_extreme_logits():
    assert int(categorical(jax.random.key(0), jnp.asarray([-1e30, 1e30, 0.0]))) == 1
