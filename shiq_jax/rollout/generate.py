"""Sampling with a KV cache: one compiled loop that returns tokens together with the statistics that losses need."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from shiq_jax.errors import Refusal
from shiq_jax.models.cache import intervals_of
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


class Samples(NamedTuple):
    """Completions and their statistics; entries behind `length` (which counts the stop token) are padding."""

    tokens: Int[Array, "B N"]
    length: Int[Array, " B"]
    logp: Float[Array, "B N"]  # of the raw logits, temperature 1, nothing filtered
    lse: Float[Array, "B N"]
    behaviour_logp: Float[Array, "B N"]  # of the distribution that was sampled


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


def make_generate(model, sampling: Sampling, stop_tokens: Sequence[int], samples_per_prompt: int = 1) -> Callable:
    """Compile-once sampler `generate(params, tokens [P, L], valid [P, L], keys [P * n]) -> Samples` with B = P * n.

    Prompts are padded on the left (`valid` False) and computed once for their `n = samples_per_prompt` completions,
    which share its cache and stand next to each other in the result. Sequence b draws token t with `fold_in(keys[b],
    t)` only, so what it becomes does not depend on who shares its batch. A sequence ends with the first of
    `stop_tokens`, which is part of it, or after `sampling.max_tokens`; the loop ends with the last sequence, and
    nothing is computed after the last drawn token.
    """
    stops = jnp.asarray(sorted(set(stop_tokens)), jnp.int32)
    steps = sampling.max_tokens

    def draw(logits, keys, t):
        raw = logits.astype(jnp.float32)
        behaviour = behaviour_logits(raw, sampling)
        if sampling.temperature == 0:
            drawn = jnp.argmax(raw, axis=-1).astype(jnp.int32)
        else:
            drawn = jax.vmap(lambda key, row: categorical(jax.random.fold_in(key, t), row))(keys, behaviour)
        stats = token_stats_from_logits(raw, drawn)
        behaviour_logp = token_stats_from_logits(behaviour, drawn).logp
        return drawn, stats.logp, stats.lse, behaviour_logp

    def drawn_into(out, params, last, keys, t, finished):
        drawn, logp, lse, behaviour_logp = draw(model.project(params, last), keys, t)
        alive = ~finished
        out = Samples(
            out.tokens.at[:, t].set(jnp.where(alive, drawn, 0)),
            out.length + alive,
            out.logp.at[:, t].set(jnp.where(alive, logp, 0)),
            out.lse.at[:, t].set(jnp.where(alive, lse, 0)),
            out.behaviour_logp.at[:, t].set(jnp.where(alive, behaviour_logp, 0)),
        )
        return drawn, finished | jnp.isin(drawn, stops), out

    @jax.jit
    def generate(params, tokens: Int[Array, "P L"], valid: Bool[Array, "P L"], keys) -> Samples:
        (prompts, width), batch = tokens.shape, tokens.shape[0] * samples_per_prompt
        positions = jnp.maximum(jnp.cumsum(valid, axis=1) - 1, 0)
        cache = model.init_cache(prompts, width + (steps - 1) * samples_per_prompt)
        hidden, cache = model.extend(params, cache, tokens, positions, 0, intervals_of(valid))
        last, lengths = jnp.repeat(hidden[:, -1], samples_per_prompt, axis=0), valid.sum(axis=1)[:, None]
        # The completions of a prompt stand in its row, where they see the prompt and themselves but not each other.
        branch = jnp.arange(samples_per_prompt)
        out = Samples(
            jnp.zeros((batch, steps), jnp.int32),
            jnp.zeros(batch, jnp.int32),
            *(jnp.zeros((batch, steps)) for _ in range(3)),
        )

        def running(carry):
            t, finished, *_ = carry
            return (t < steps) & ~jnp.all(finished)

        def step(carry):
            t, finished, drawn, cache, out = carry
            before, shape = t - 1, (prompts, samples_per_prompt)
            where = jnp.broadcast_to(lengths + before, shape)
            intervals = intervals_of(~finished.reshape(shape), branch, branch + 1)
            start = width + before * samples_per_prompt
            hidden, cache = model.extend(params, cache, drawn.reshape(shape), where, start, intervals)
            drawn, finished, out = drawn_into(out, params, hidden.reshape(batch, -1), keys, t, finished)
            return t + 1, finished, drawn, cache, out

        drawn, finished, out = drawn_into(out, params, last, keys, jnp.int32(0), jnp.zeros(batch, bool))
        if steps == 1:
            # The cache has no slots for what a step would write.
            return out
        return jax.lax.while_loop(running, step, (jnp.int32(1), finished, drawn, cache, out))[-1]

    return generate


def pad_prompts(
    prompts: Sequence[Sequence[int]], smallest: int = 32, widest: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Left-padded `(tokens [P, L], valid [P, L])`, L among few numbers, because each makes another program to compile.

    L is the first of `smallest` times 1, 2, 3, 4, 6, 8, 12, ... that holds the longest prompt, but at most `widest`,
    which no prompt may exceed.
    """
    longest = max(map(len, prompts))
    widths = (smallest * factor for k in itertools.count() for factor in (2**k, 3 * 2**k // 2))
    width = next(width for width in widths if width >= longest)
    width = width if widest is None else min(width, widest)
    tokens, valid = np.zeros((len(prompts), width), np.int32), np.zeros((len(prompts), width), bool)
    for row, prompt in enumerate(prompts):
        tokens[row, width - len(prompt) :] = prompt
        valid[row, width - len(prompt) :] = True
    return tokens, valid


class Sampler:
    """Draws `samples_per_prompt` completions for lists of prompts, in batches of one fixed number of prompts.

    Args:
        model: supplies `init_cache`, `extend` and `project`.
        sampling: how tokens are drawn.
        stop_tokens: ids that end a sequence.
        prompts_per_batch: prompts in one compiled call; a short last batch is filled up and the filling dropped.
    """

    def __init__(
        self, model, sampling: Sampling, stop_tokens: Sequence[int], *, samples_per_prompt=1, prompts_per_batch=16
    ):
        self.samples_per_prompt, self.prompts_per_batch = samples_per_prompt, prompts_per_batch
        self._generate = make_generate(model, sampling, stop_tokens, samples_per_prompt)
        self._context = model.config.max_positions
        self._max_tokens = sampling.max_tokens

    def __call__(self, params, prompts: Sequence[Sequence[int]], key, first: int = 0) -> list[list[dict]]:
        """For each prompt its completions as dicts of numpy arrays `tokens, logp, lse, behaviour_logp`.

        `first` is the number of the first prompt: prompt i draws with `fold_in(key, first + i)`, whatever the batches.
        Raises Refusal, naming the prompt by that number, when one is empty or leaves no room for `max_tokens`.
        """
        for number, prompt in enumerate(prompts, first):
            self._check(number, len(prompt))
        out, widest = [], self._context - self._max_tokens
        for start in range(0, len(prompts), self.prompts_per_batch):
            chunk = list(prompts[start : start + self.prompts_per_batch])
            real = len(chunk)
            chunk += [chunk[-1]] * (self.prompts_per_batch - real)
            numbers = jnp.arange(len(chunk)) + first + start
            keys = jax.vmap(lambda n: jax.random.split(jax.random.fold_in(key, n), self.samples_per_prompt))(numbers)
            samples = jax.device_get(self._generate(params, *pad_prompts(chunk, widest=widest), keys.reshape(-1)))
            for p in range(real):
                rows = range(p * self.samples_per_prompt, (p + 1) * self.samples_per_prompt)
                out.append([_trim(samples, row) for row in rows])
        return out

    def _check(self, number: int, length: int) -> None:
        new, context = self._max_tokens, self._context
        if length == 0:
            raise Refusal(
                f"prompt {number} has no tokens, so nothing predicts the first one that is drawn: give it some text, "
                "or the token that opens a text"
            )
        if length + new > context:
            ways = [f"shorten the prompt to {context - new}"] if new < context else []
            ways += [f"lower max_tokens to {context - length}"] if length < context else []
            raise Refusal(
                f"prompt {number} has {length} tokens, which with max_tokens={new} exceed the model's context of "
                f"{context}: {' or '.join(ways) or 'shorten the prompt and lower max_tokens'}"
            )


def _trim(samples: Samples, row: int) -> dict:
    length = int(samples.length[row])
    names = ("tokens", "logp", "lse", "behaviour_logp")
    return {name: np.asarray(getattr(samples, name)[row, :length]) for name in names}
