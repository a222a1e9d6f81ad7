"""Sample tokens with temperature, top-k and top-p, and compute their statistics."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from shiq_jax.objectives import token_stats_from_logits
from shiq_jax.rollout.categorical import categorical


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Sampling parameters."""

    temperature: float = 1.0
    """Softmax temperature; 0 is greedy decoding."""
    top_k: int = 0
    """Sample from the k most likely tokens; 0 disables."""
    top_p: float = 1.0
    """Sample from the smallest set of tokens whose probabilities sum to at least this; 1 disables."""
    max_tokens: int = 64
    """Maximum completion length, in tokens."""

    def __post_init__(self):
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be at least 0 and finite, not {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be at least 0 (0 keeps every token), not {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], not {self.top_p}")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, not {self.max_tokens}")


class SampledTokens(NamedTuple):
    """One token for each sequence, with its statistics."""

    tokens: Int[Array, " B"]
    logp: Float[Array, " B"]  # under the raw logits: temperature 1, no filter
    lse: Float[Array, " B"]
    behaviour_logp: Float[Array, " B"]  # under the sampling distribution


def sample_tokens(
    logits: Float[Array, "B V"],
    keys: jax.Array,
    counts: Int[Array, " B"],
    sampling: Sampling,
    greedy: Bool[Array, " B"] | None = None,
) -> SampledTokens:
    """Sample the next token of every sequence; the randomness of token t is `fold_in(key, t)`.

    Args:
        logits: raw logits.
        keys: [B], one random key per sequence.
        counts: number of tokens sampled so far, t.
        sampling: sampling parameters.
        greedy: sequences whose most likely token is taken regardless of `sampling`.
    """
    raw = logits.astype(jnp.float32)
    filtered = filter_logits(raw, sampling)
    if sampling.temperature == 0:
        tokens = jnp.argmax(raw, axis=-1).astype(jnp.int32)
    else:
        sample = jax.vmap(lambda key, count, row: categorical(jax.random.fold_in(key, count), row))
        tokens = sample(keys, counts, filtered)
    behaviour_logp = token_stats_from_logits(filtered, tokens).logp
    if greedy is not None:
        tokens = jnp.where(greedy, jnp.argmax(raw, axis=-1).astype(jnp.int32), tokens)
        behaviour_logp = jnp.where(greedy, 0.0, behaviour_logp)
    stats = token_stats_from_logits(raw, tokens)
    return SampledTokens(tokens, stats.logp, stats.lse, behaviour_logp)


def filter_logits(logits: Float[Array, "B V"], sampling: Sampling) -> Float[Array, "B V"]:
    """Logits of the sampling distribution: divide by the temperature, then apply top-k, then top-p.

    Temperature 0 puts all mass on the most likely token. Ties with the smallest kept logit are kept.
    """
    vocab_size = logits.shape[-1]
    if sampling.temperature == 0:
        best = jnp.argmax(logits, axis=-1, keepdims=True)
        return jnp.where(jnp.arange(vocab_size) == best, 0.0, -jnp.inf)
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < vocab_size:
        threshold = jax.lax.top_k(logits, sampling.top_k)[0][..., -1:]
        logits = jnp.where(logits >= threshold, logits, -jnp.inf)
    if sampling.top_p < 1:
        descending = jnp.sort(logits, axis=-1, descending=True)
        probabilities = jax.nn.softmax(descending, axis=-1)
        mass_before = jnp.cumsum(probabilities, axis=-1) - probabilities
        threshold = jnp.min(jnp.where(mass_before < sampling.top_p, descending, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits >= threshold, logits, -jnp.inf)
    return logits
