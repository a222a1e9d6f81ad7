"""How a token is drawn, and the statistics that are written down with it."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from shiq_jax.objectives import token_stats_from_logits
from shiq_jax.rollout.categorical import categorical


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are drawn."""

    temperature: float = 1.0
    """Logits are divided by it; 0 takes the most likely token."""
    top_k: int = 0
    """Draw among the so many most likely tokens; 0 among all."""
    top_p: float = 1.0
    """Draw among the fewest tokens whose probabilities sum to this; 1 among all."""
    max_tokens: int = 64
    """Longest completion, in tokens."""

    def __post_init__(self):
        if self.temperature < 0:
            raise ValueError(f"temperature must be at least 0, not {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be at least 0 (0 keeps every token), not {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], not {self.top_p}")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, not {self.max_tokens}")


class SampledTokens(NamedTuple):
    """One token for each sequence, with its statistics."""

    tokens: Int[Array, " B"]
    logp: Float[Array, " B"]  # of the raw logits, temperature 1, nothing filtered
    lse: Float[Array, " B"]
    behaviour_logp: Float[Array, " B"]  # of the distribution that was sampled


def sample_tokens(
    logits: Float[Array, "B V"],
    keys: jax.Array,
    counts: Int[Array, " B"],
    sampling: Sampling,
    greedy: Bool[Array, " B"] | None = None,
) -> SampledTokens:
    """The next token of every sequence: token t of a sequence is drawn with `fold_in(key, t)` and nothing else.

    Where `greedy` holds, it is the most likely one, whatever `sampling` says.
    """
    raw = logits.astype(jnp.float32)
    behaviour = behaviour_logits(raw, sampling)
    if sampling.temperature == 0:
        tokens = jnp.argmax(raw, axis=-1).astype(jnp.int32)
    else:
        fold = jax.vmap(lambda key, count, row: categorical(jax.random.fold_in(key, count), row))
        tokens = fold(keys, counts, behaviour)
    behaviour_logp = token_stats_from_logits(behaviour, tokens).logp
    if greedy is not None:
        tokens = jnp.where(greedy, jnp.argmax(raw, axis=-1).astype(jnp.int32), tokens)
        behaviour_logp = jnp.where(greedy, 0.0, behaviour_logp)
    stats = token_stats_from_logits(raw, tokens)
    return SampledTokens(tokens, stats.logp, stats.lse, behaviour_logp)


def behaviour_logits(logits: Float[Array, "B V"], sampling: Sampling) -> Float[Array, "B V"]:
    """Logits of the distribution that is sampled: tempered, then cut to top_k, then to the smallest set holding top_p.

    Temperature 0 puts all mass on the most likely token. Logits that equal the last one kept are kept too.
    """
    vocabulary = logits.shape[-1]
    if sampling.temperature == 0:
        best = jnp.argmax(logits, axis=-1, keepdims=True)
        return jnp.where(jnp.arange(vocabulary) == best, 0.0, -jnp.inf)
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < vocabulary:
        smallest_kept = jax.lax.top_k(logits, sampling.top_k)[0][..., -1:]
        logits = jnp.where(logits >= smallest_kept, logits, -jnp.inf)
    if sampling.top_p < 1:
        descending = jnp.sort(logits, axis=-1, descending=True)
        probabilities = jax.nn.softmax(descending, axis=-1)
        mass_before = jnp.cumsum(probabilities, axis=-1) - probabilities
        smallest_kept = jnp.min(jnp.where(mass_before < sampling.top_p, descending, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits >= smallest_kept, logits, -jnp.inf)
    return logits
