"""Device side of sampling: compiled programs over a fixed number of prompt rows and decoding lanes.

A row caches one prompt. Each of its lanes decodes one completion at a time and takes the prompt's next completion when
that one ends.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from shiq_jax.models.cache import Branches, Cache, replace_rows, slot_intervals
from shiq_jax.rollout.sampling import SampledTokens, Sampling, sample_tokens


class DecodeState(NamedTuple):
    """State of the decoding loop; a lane whose `sample` equals the number of completions per prompt is idle."""

    cache: Cache  # KV cache of the prompts
    branches: Branches  # KV cache of the completions in progress
    slot: Int[Array, ""]  # position of the next token in the ring buffer of the branches
    prompt_hidden: Float[Array, "rows features"]  # last hidden state of each prompt, which predicts the first token
    prompt_lengths: Int[Array, " rows"]
    keys: jax.Array  # [rows, samples]
    started: Int[Array, " rows"]  # completions of the prompt that have been assigned to a lane
    sample: Int[Array, "rows lanes"]  # completion that the lane decodes
    count: Int[Array, "rows lanes"]  # tokens that the lane has sampled for its completion
    last: Int[Array, "rows lanes"]  # last token of the lane
    sampled: SampledTokens  # [rows, samples, max_tokens]
    completion_lengths: Int[Array, "rows samples"]  # 0 while the completion is in progress


class DecodeLoop:
    """Jitted programs over `DecodeState`; `admit` and `advance` donate the state that they are given.

    Args:
        model: see `generate.Sampler`.
        sampling: sampling parameters.
        stop_tokens: ids that end a completion.
        samples: completions per prompt, including the greedy one.
        lanes: completions of a prompt that are decoded at once.
        greedy: decode the last completion of each prompt greedily.
    """

    def __init__(
        self, model, sampling: Sampling, stop_tokens: tuple[int, ...], samples: int, lanes: int, greedy: bool = False
    ):
        self._model, self._sampling, self._samples, self._lanes = model, sampling, samples, lanes
        self._greedy = greedy
        self._stop_tokens = jnp.asarray(sorted(set(stop_tokens)), jnp.int32)
        self.start = jax.jit(self._start, static_argnums=(1, 2))
        self.admit = jax.jit(self._admit, donate_argnums=1)
        self.advance = jax.jit(self._advance, donate_argnums=1)
        self.busy = jax.jit(lambda state: self._busy(state))
        self.completions = jax.jit(
            lambda state, rows: (jax.tree.map(lambda x: x[rows], state.sampled), state.completion_lengths[rows])
        )

    def _start(self, params, rows: int, width: int) -> DecodeState:
        """Empty state with `rows` rows for prompts of up to `width` tokens."""
        samples, max_tokens = self._samples, self._sampling.max_tokens
        cache = self._model.init_cache(rows, width)
        # The last token of a completion is never fed back.
        branches = self._model.init_branches(rows, self._lanes, max(max_tokens - 1, 1))
        hidden = jax.eval_shape(
            self._model.extend_branches, params, cache, branches, *(jnp.zeros((rows, self._lanes), jnp.int32),) * 3, 0
        )[0]
        lane_zeros, shape = jnp.zeros((rows, self._lanes), jnp.int32), (rows, samples, max_tokens)
        return DecodeState(
            cache=cache,
            branches=branches,
            slot=jnp.int32(0),
            prompt_hidden=jnp.zeros((rows, hidden.shape[-1]), hidden.dtype),
            prompt_lengths=jnp.zeros(rows, jnp.int32),
            keys=jax.random.split(jax.random.key(0), (rows, samples)),
            started=jnp.full(rows, samples, jnp.int32),
            sample=lane_zeros + samples,
            count=lane_zeros,
            last=lane_zeros,
            sampled=SampledTokens(jnp.zeros(shape, jnp.int32), *(jnp.zeros(shape) for _ in range(3))),
            completion_lengths=jnp.zeros((rows, samples), jnp.int32),
        )

    def _admit(
        self,
        params,
        state: DecodeState,
        rows: Int[Array, " admitted"],
        tokens: Int[Array, "admitted width"],
        valid: Bool[Array, "admitted width"],
        keys: jax.Array,
    ) -> DecodeState:
        """Prefill left-padded prompts into `rows`; entries with the same row must have the same prompt and keys."""
        positions = jnp.maximum(jnp.cumsum(valid, axis=1) - 1, 0)
        fresh = self._model.init_cache(*tokens.shape)
        hidden, fresh = self._model.extend(params, fresh, tokens, positions, 0, slot_intervals(valid))
        return state._replace(
            cache=replace_rows(state.cache, rows, fresh),
            prompt_hidden=state.prompt_hidden.at[rows].set(hidden[:, -1]),
            prompt_lengths=state.prompt_lengths.at[rows].set(valid.sum(axis=1)),
            keys=state.keys.at[rows].set(keys),
            started=state.started.at[rows].set(self._lanes),
            sample=state.sample.at[rows].set(jnp.arange(self._lanes)),
            count=state.count.at[rows].set(0),
            sampled=jax.tree.map(lambda leaf: leaf.at[rows].set(0), state.sampled),
            completion_lengths=state.completion_lengths.at[rows].set(0),
        )

    def _busy(self, state: DecodeState) -> Bool[Array, " rows"]:
        """Whether each row has a completion in progress."""
        return jnp.any(state.sample < self._samples, axis=1)

    def _advance(self, params, state: DecodeState, idle: Int[Array, ""]) -> DecodeState:
        """Decode until `idle` rows are idle."""
        return jax.lax.while_loop(lambda state: jnp.sum(~self._busy(state)) < idle, partial(self._step, params), state)

    def _step(self, params, state: DecodeState) -> DecodeState:
        """Sample one token in every active lane."""
        samples, max_tokens = self._samples, self._sampling.max_tokens
        rows, lanes = state.sample.shape
        positions = state.prompt_lengths[:, None] + state.count - 1
        hidden, branches = self._model.extend_branches(
            params, state.cache, state.branches, state.last, positions, state.count, state.slot
        )
        hidden = jnp.where((state.count == 0)[..., None], state.prompt_hidden[:, None], hidden)
        logits = self._model.project(params, hidden).reshape(rows * lanes, -1)
        keys = jnp.take_along_axis(state.keys, jnp.minimum(state.sample, samples - 1), axis=1)
        greedy = (state.sample == samples - 1).reshape(-1) if self._greedy else None
        new = sample_tokens(logits, keys.reshape(-1), state.count.reshape(-1), self._sampling, greedy)
        new = jax.tree.map(lambda leaf: leaf.reshape(rows, lanes), new)

        # An idle lane writes out of bounds, and mode="drop" discards that.
        index = (jnp.arange(rows)[:, None], state.sample, state.count)
        sampled = jax.tree.map(lambda leaf, values: leaf.at[index].set(values, mode="drop"), state.sampled, new)
        count = state.count + 1
        idle = state.sample == samples
        finished = ~idle & (jnp.isin(new.tokens, self._stop_tokens) | (count == max_tokens))
        lengths = state.completion_lengths.at[index[:2]].set(jnp.where(finished, count, 0), mode="drop")
        next_sample = state.started[:, None] + jnp.cumsum(finished, axis=1) - 1
        return state._replace(
            branches=branches,
            slot=(state.slot + 1) % branches.values.shape[-2],
            started=state.started + jnp.sum(finished, axis=1, dtype=jnp.int32),
            sample=jnp.where(finished, jnp.minimum(next_sample, samples), state.sample).astype(jnp.int32),
            count=jnp.where(finished | idle, 0, count),
            last=new.tokens,
            sampled=sampled,
            completion_lengths=lengths,
        )
