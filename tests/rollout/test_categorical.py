"""Draws come as often as their probabilities say, and never where there is none."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from shiq_jax.rollout.categorical import categorical


@pytest.mark.parametrize("size", [3, 128, 300, 1000])
def test_frequencies_are_the_probabilities(size):
    rng = np.random.default_rng(size)
    logits = jnp.asarray(rng.normal(size=size) * 2)
    drawn = jax.jit(jax.vmap(categorical, (0, None)))(jax.random.split(jax.random.key(1), 200_000), logits)
    expected = np.asarray(jax.nn.softmax(logits), np.float64) * len(drawn)
    common = expected > 20
    counts = np.bincount(drawn, minlength=size)
    observed = np.append(counts[common], counts[~common].sum())
    wanted = np.append(expected[common], expected[~common].sum())
    keep = wanted > 0
    assert stats.chisquare(observed[keep], wanted[keep] * observed.sum() / wanted[keep].sum()).pvalue > 1e-3


def test_what_has_no_mass_is_never_drawn():
    logits = jnp.where(jnp.arange(700) % 7 == 3, 0.0, -jnp.inf).at[:200].set(-jnp.inf)
    drawn = jax.jit(jax.vmap(categorical, (0, None)))(jax.random.split(jax.random.key(0), 50_000), logits)
    assert (np.asarray(drawn) % 7 == 3).all() and drawn.min() >= 200
    assert len(np.unique(drawn)) == 71 and drawn.max() < 700


def test_a_single_token_with_mass_is_certain():
    logits = jnp.full(500, -jnp.inf).at[499].set(-1e4)
    drawn = jax.jit(jax.vmap(categorical, (0, None)))(jax.random.split(jax.random.key(0), 1000), logits)
    assert (np.asarray(drawn) == 499).all()


def test_scores_of_any_size_are_finite():
    assert int(categorical(jax.random.key(0), jnp.asarray([-1e30, 1e30, 0.0]))) == 1
