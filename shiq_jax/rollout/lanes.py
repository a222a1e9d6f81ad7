"""The device's side of sampling: rows that hold prompts, lanes that draw their completions, and three programs."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from shiq_jax.models.cache import Branches, Cache, replace_rows, slot_intervals
from shiq_jax.rollout.sampling import SampledTokens, Sampling, sample_tokens


class Lanes(NamedTuple):
    """Everything that is under way. A lane whose sample is the number of a prompt's completions draws nothing."""

    cache: Cache  # the prompts
    branches: Branches  # what the lanes have drawn
    slot: Int[Array, ""]  # of the branches' ring, where the next token goes
    ends: Float[Array, "rows features"]  # the hidden state that predicts a prompt's first completion token
    lengths: Int[Array, " rows"]  # tokens of the prompts
    keys: jax.Array  # [rows, samples]
    begun: Int[Array, " rows"]  # how many of the prompt's completions have, or had, a lane
    sample: Int[Array, "rows lanes"]
    count: Int[Array, "rows lanes"]  # how many tokens of its sample a lane has drawn
    last: Int[Array, "rows lanes"]  # the last of them
    drawn: SampledTokens  # [rows, samples, max_tokens]
    ended: Int[Array, "rows samples"]  # length of the completions that have ended, else 0


class DecodeLoop:
    """The programs over `Lanes`, compiled once for each size; a state that is handed over is used up.

    Args: as `generate.Sampler`; `samples` counts all completions of a prompt, the last of which is greedy where
    `greedy` says so, and `lanes` is how many of them are drawn at once.
    """

    def __init__(
        self, model, sampling: Sampling, stop_tokens: tuple[int, ...], samples: int, lanes: int, greedy: bool = False
    ):
        self._model, self._sampling, self._samples, self._lanes = model, sampling, samples, lanes
        self._greedy = greedy
        self._stops = jnp.asarray(sorted(set(stop_tokens)), jnp.int32)
        self.start = jax.jit(self._start, static_argnums=(1, 2))
        self.admit = jax.jit(self._admit, donate_argnums=1)
        self.advance = jax.jit(self._advance, donate_argnums=1)
        self.busy = jax.jit(lambda state: self._busy(state))
        self.take = jax.jit(lambda state, rows: (jax.tree.map(lambda x: x[rows], state.drawn), state.ended[rows]))

    def _start(self, params, rows: int, width: int) -> Lanes:
        """Nothing under way: `rows` rows for prompts of up to `width` tokens."""
        samples, steps = self._samples, self._sampling.max_tokens
        cache = self._model.init_cache(rows, width)
        # The token that is drawn last is never read.
        branches = self._model.init_branches(rows, self._lanes, max(steps - 1, 1))
        hidden = jax.eval_shape(
            self._model.extend_branches, params, cache, branches, *(jnp.zeros((rows, self._lanes), jnp.int32),) * 3, 0
        )[0]
        each, all_ = jnp.zeros((rows, self._lanes), jnp.int32), (rows, samples, steps)
        return Lanes(
            cache=cache,
            branches=branches,
            slot=jnp.int32(0),
            ends=jnp.zeros((rows, hidden.shape[-1]), hidden.dtype),
            lengths=jnp.zeros(rows, jnp.int32),
            keys=jax.random.split(jax.random.key(0), (rows, samples)),
            begun=jnp.full(rows, samples, jnp.int32),
            sample=each + samples,
            count=each,
            last=each,
            drawn=SampledTokens(jnp.zeros(all_, jnp.int32), *(jnp.zeros(all_) for _ in range(3))),
            ended=jnp.zeros((rows, samples), jnp.int32),
        )

    def _admit(
        self,
        params,
        state: Lanes,
        rows: Int[Array, " some"],
        tokens: Int[Array, "some width"],
        valid: Bool[Array, "some width"],
        keys: jax.Array,
    ) -> Lanes:
        """The state with prompts, padded on the left, in some rows; a row that comes twice must come with the same."""
        positions = jnp.maximum(jnp.cumsum(valid, axis=1) - 1, 0)
        fresh = self._model.init_cache(*tokens.shape)
        hidden, fresh = self._model.extend(params, fresh, tokens, positions, 0, slot_intervals(valid))
        return state._replace(
            cache=replace_rows(state.cache, rows, fresh),
            ends=state.ends.at[rows].set(hidden[:, -1]),
            lengths=state.lengths.at[rows].set(valid.sum(axis=1)),
            keys=state.keys.at[rows].set(keys),
            begun=state.begun.at[rows].set(self._lanes),
            sample=state.sample.at[rows].set(jnp.arange(self._lanes)),
            count=state.count.at[rows].set(0),
            drawn=jax.tree.map(lambda leaf: leaf.at[rows].set(0), state.drawn),
            ended=state.ended.at[rows].set(0),
        )

    def _busy(self, state: Lanes) -> Bool[Array, " rows"]:
        """Which rows still have something to draw."""
        return jnp.any(state.sample < self._samples, axis=1)

    def _advance(self, params, state: Lanes, idle: Int[Array, ""]) -> Lanes:
        """The state after as many steps as it takes until `idle` rows have nothing to draw."""
        return jax.lax.while_loop(lambda state: jnp.sum(~self._busy(state)) < idle, partial(self._step, params), state)

    def _step(self, params, state: Lanes) -> Lanes:
        """One token more in every lane that draws."""
        samples, steps = self._samples, self._sampling.max_tokens
        rows, lanes = state.sample.shape
        positions = state.lengths[:, None] + state.count - 1
        hidden, branches = self._model.extend_branches(
            params, state.cache, state.branches, state.last, positions, state.count, state.slot
        )
        hidden = jnp.where((state.count == 0)[..., None], state.ends[:, None], hidden)
        logits = self._model.project(params, hidden).reshape(rows * lanes, -1)
        keys = jnp.take_along_axis(state.keys, jnp.minimum(state.sample, samples - 1), axis=1)
        greedy = (state.sample == samples - 1).reshape(-1) if self._greedy else None
        new = sample_tokens(logits, keys.reshape(-1), state.count.reshape(-1), self._sampling, greedy)
        new = jax.tree.map(lambda leaf: leaf.reshape(rows, lanes), new)

        # What an idle lane draws goes to a sample that is not there, and is dropped.
        where = (jnp.arange(rows)[:, None], state.sample, state.count)
        drawn = jax.tree.map(lambda leaf, values: leaf.at[where].set(values, mode="drop"), state.drawn, new)
        count = state.count + 1
        ends = (state.sample < samples) & (jnp.isin(new.tokens, self._stops) | (count == steps))
        ended = state.ended.at[where[:2]].set(jnp.where(ends, count, 0), mode="drop")
        following = state.begun[:, None] + jnp.cumsum(ends, axis=1) - 1
        idle = state.sample == samples
        return state._replace(
            branches=branches,
            slot=(state.slot + 1) % branches.values.shape[-2],
            begun=state.begun + jnp.sum(ends, axis=1, dtype=jnp.int32),
            sample=jnp.where(ends, jnp.minimum(following, samples), state.sample).astype(jnp.int32),
            count=jnp.where(ends | idle, 0, count),
            last=new.tokens,
            drawn=drawn,
            ended=ended,
        )
