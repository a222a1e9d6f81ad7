"""Categorical sampling from a large vocabulary with two uniform random numbers per sample."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

_BLOCK_SIZE = 128


def categorical(key: jax.Array, logits: Float[Array, " vocab"]) -> Int[Array, ""]:
    """Sample one token from softmax(logits); tokens with logit -inf are never sampled.

    Inverse transform sampling in two levels: first a block of tokens, then a token of the block. The Gumbel trick of
    `jax.random.categorical` needs a random number per vocabulary entry, which on a CPU costs more than the forward pass
    of a small model.
    """
    vocab_size = logits.shape[-1]
    blocks = -(-vocab_size // _BLOCK_SIZE)
    mass = jnp.exp(logits - jnp.max(logits))
    mass = jnp.pad(mass, (0, blocks * _BLOCK_SIZE - vocab_size)).reshape(blocks, _BLOCK_SIZE)
    block_uniform, token_uniform = jax.random.uniform(key, (2,))
    block = _inverse_cdf(block_uniform, mass.sum(axis=-1))
    return (block * _BLOCK_SIZE + _inverse_cdf(token_uniform, mass[block])).astype(jnp.int32)


def _inverse_cdf(uniform: Float[Array, ""], mass: Float[Array, " n"]) -> Int[Array, ""]:
    """The first entry of positive mass at which the cumulative sum exceeds `uniform` times the total."""
    cumulative = jnp.cumsum(mass)
    exceeds = (cumulative > uniform * cumulative[-1]) & (mass > 0)
    # Rounding can leave no such entry; then return one that certainly has mass.
    return jnp.where(jnp.any(exceeds), jnp.argmax(exceeds), jnp.argmax(mass))
