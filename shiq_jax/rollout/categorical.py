"""Draws from a large vocabulary, two random numbers each."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

_WIDTH = 128


def categorical(key: jax.Array, logits: Float[Array, " vocab"]) -> Int[Array, ""]:
    """One token from softmax(logits); tokens of logit -inf are never drawn.

    A block of tokens by its mass, then a token of the block by its own: inversion of the distribution function at both
    levels. The Gumbel trick of `jax.random.categorical` draws a random number per token of the vocabulary, which on a
    CPU costs more than a small model's forward pass.
    """
    size = logits.shape[-1]
    blocks = -(-size // _WIDTH)
    mass = jnp.exp(logits - jnp.max(logits))
    mass = jnp.pad(mass, (0, blocks * _WIDTH - size)).reshape(blocks, _WIDTH)
    first, second = jax.random.uniform(key, (2,))
    block = _invert(first, mass.sum(axis=-1))
    return (block * _WIDTH + _invert(second, mass[block])).astype(jnp.int32)


def _invert(uniform: Float[Array, ""], mass: Float[Array, " n"]) -> Int[Array, ""]:
    """The first entry of positive mass at which the running sum exceeds `uniform` of the total."""
    running = jnp.cumsum(mass)
    beyond = (running > uniform * running[-1]) & (mass > 0)
    # Rounding may leave none beyond; the heaviest entry is then as good as the last.
    return jnp.where(jnp.any(beyond), jnp.argmax(beyond), jnp.argmax(mass))
