"""Gaussian noise on a sum, once for all devices."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from shiq_jax.privacy.mechanism import Mechanism

# Streams of one root key; the sampler's is apart, drawn on the host.
NOISE = 1


def privatize(total: Any, mechanism: Mechanism, root: Array, step: Array) -> Any:
    """(sum + noise) / expected batch: what may be released of a sum of clipped gradients.

    The noise is a function of the root key and the step, float32, drawn alike for each parameter however it is cut over
    devices, so that replicas agree and shards do not repeat each other.

    Args:
        total: pytree, the sum over all devices.
        mechanism: whose noise and divisor are taken.
        root: secret jax key of the run.
        step: number of the step.
    """
    leaves, structure = jax.tree.flatten(total)
    keys = jax.random.split(jax.random.fold_in(jax.random.fold_in(root, NOISE), step), len(leaves))
    noisy = [
        _with_noise(leaf.astype(jnp.float32), key, mechanism.noise_stddev) / mechanism.expected_batch
        for leaf, key in zip(leaves, keys)
    ]
    return jax.tree.unflatten(structure, noisy)


def _with_noise(leaf: Array, key: Array, stddev: float) -> Array:
    """A stack of matrices gets its noise one after the other: all at once would be most of the memory of a step."""
    if leaf.ndim < 3:
        return leaf + stddev * jax.random.normal(key, leaf.shape, jnp.float32)

    def add(index, leaf):
        noise = jax.random.normal(jax.random.fold_in(key, index), leaf.shape[1:], jnp.float32)
        return leaf.at[index].add(stddev * noise)

    return jax.lax.fori_loop(0, len(leaf), add, leaf)
