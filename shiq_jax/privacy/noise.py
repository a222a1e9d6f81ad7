"""Gaussian noise on a sum of clipped gradients."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from shiq_jax.privacy.mechanism import Mechanism

# Folded into the root key before the step number.
NOISE_STREAM = 1


def privatize(total: Any, mechanism: Mechanism, root: Array, step: Array) -> Any:
    """Compute (sum + noise) / expected batch, which may be released.

    The noise is float32 and a function of root key, step and parameter shapes only. It does not depend on the
    sharding: replicas get equal noise, shards independent noise.

    Args:
        total: pytree, the sum of clipped gradients over all devices.
        mechanism: sets the standard deviation of the noise and the divisor.
        root: secret jax key of the run.
        step: step number.
    """
    leaves, structure = jax.tree.flatten(total)
    keys = jax.random.split(jax.random.fold_in(jax.random.fold_in(root, NOISE_STREAM), step), len(leaves))
    noisy = [
        _add_noise(leaf.astype(jnp.float32), key, mechanism.noise_stddev) / mechanism.expected_batch
        for leaf, key in zip(leaves, keys)
    ]
    return jax.tree.unflatten(structure, noisy)


def _add_noise(leaf: Array, key: Array, stddev: float) -> Array:
    """Add Gaussian noise, one layer of a stack at a time: noise for all layers would dominate the memory of a step."""
    if leaf.ndim < 3:
        return leaf + stddev * jax.random.normal(key, leaf.shape, jnp.float32)

    def add(index, leaf):
        noise = jax.random.normal(jax.random.fold_in(key, index), leaf.shape[1:], jnp.float32)
        return leaf.at[index].add(stddev * noise)

    return jax.lax.fori_loop(0, len(leaf), add, leaf)
