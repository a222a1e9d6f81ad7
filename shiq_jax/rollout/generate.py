"""Continuous batching: sample completions of any number of prompts with a fixed number of decoding lanes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from shiq_jax.errors import UserError
from shiq_jax.rollout.lanes import DecodeLoop
from shiq_jax.rollout.sampling import SampledTokens, Sampling
from shiq_jax.sharding import hosts

# An eighth of the rows is refilled at a time: larger prefills are more efficient, but idle rows wait longer for them.
_REFILL_DIVISOR = 8


def pad_prompts(
    prompts: Sequence[Sequence[int]], smallest: int = 32, widest: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Left-pad prompts to `(tokens [P, L], valid [P, L])`.

    L is the first of `smallest` times 1, 2, 3, 4, 6, 8, 12, ... that holds the longest prompt, and at most `widest`.
    Few distinct lengths keep the number of compiled programs small.
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
    """Samples `samples_per_prompt` completions of each prompt with continuous batching.

    A prompt is prefilled once and occupies a row until its completions have ended. A lane of the row starts the next
    completion as soon as one ends, and a row whose completions have ended takes the next prompt. The cost therefore
    depends on the number of sampled tokens, not on the longest completion.

    Args:
        model: provides `init_cache`, `extend`, `init_branches`, `branch` and `project`.
        sampling: sampling parameters.
        stop_tokens: ids that end a completion.
        samples_per_prompt: completions per prompt.
        prompts_in_flight: number of rows, the prompts that are decoded at once.
        lanes_per_prompt: completions of one prompt that are decoded at once; by default half of them. Fewer lanes
            finish closer together; more lanes share each read of the prompt's cache.
        greedy: add a greedy completion to each prompt, after the sampled ones.
    """

    def __init__(
        self,
        model,
        sampling: Sampling,
        stop_tokens: Sequence[int],
        *,
        samples_per_prompt: int = 1,
        prompts_in_flight: int = 32,
        lanes_per_prompt: int | None = None,
        greedy: bool = False,
    ):
        self.prompts_in_flight, self._completions = prompts_in_flight, samples_per_prompt + greedy
        lanes = -(-self._completions // 2) if lanes_per_prompt is None else lanes_per_prompt
        lanes = min(lanes, self._completions)
        self._loop = DecodeLoop(model, sampling, tuple(stop_tokens), self._completions, lanes, greedy)
        self._context = model.config.max_positions
        self._max_tokens = sampling.max_tokens

    def __call__(self, params, prompts: Sequence[Sequence[int]], key, first: int = 0) -> list[list[dict]]:
        """For each prompt, its completions as dicts of numpy arrays `tokens, logp, lse, behaviour_logp`.

        Prompt i uses the random key `fold_in(key, first + i)`, so its samples do not depend on the other prompts.

        Raises:
            UserError: prompt number `first + i` is empty or leaves no room for `max_tokens`.
        """
        completions = dict(self.stream(params, prompts, key, first))
        return [completions[index] for index in range(len(prompts))]

    def stream(self, params, prompts: Sequence[Sequence[int]], key, first: int = 0) -> Iterator[tuple[int, list[dict]]]:
        """Yield (prompt index, completions) in the order in which prompts finish; see `__call__`."""
        for number, prompt in enumerate(prompts, first):
            self._check(number, len(prompt))
        if not prompts:
            return
        # A power of two, to compile few programs; at most the next one above the number of prompts, to avoid idle rows.
        rows = min(self.prompts_in_flight, 1 << (len(prompts) - 1).bit_length())
        refill_size = max(1, rows // _REFILL_DIVISOR)
        widest = self._context - self._max_tokens
        width = pad_prompts([max(prompts, key=len)], widest=widest)[0].shape[1]
        state = self._loop.start(params, rows, width)
        # Sorting by length keeps the padding of each prefill small.
        waiting = sorted(range(len(prompts)), key=lambda index: (len(prompts[index]), -index))
        active: dict[int, int] = {}  # row -> prompt index
        while waiting or active:
            free = [row for row in range(rows) if row not in active]
            while waiting and len(free) >= min(refill_size, len(waiting)):
                admitted = {free.pop(): waiting.pop() for _ in range(min(refill_size, len(waiting)))}
                active |= admitted
                state = self._admit(params, state, admitted, prompts, key, first, refill_size, widest)
            state = self._loop.advance(params, state, rows - len(active) + min(refill_size, len(active)))
            busy = hosts.gather(self._loop.busy(state))
            finished = [row for row in active if not busy[row]]
            for start in range(0, len(finished), refill_size):
                chunk = finished[start : start + refill_size]
                padded = np.resize(np.asarray(chunk, np.int32), refill_size)
                completions = hosts.gather(self._loop.completions(state, padded))
                for position, row in enumerate(chunk):
                    yield active.pop(row), _trim(completions, position)

    def _admit(self, params, state, admitted: dict[int, int], prompts, key, first: int, refill_size: int, widest: int):
        # np.resize repeats entries to fill the fixed size; admitting a prompt twice into its row has no effect.
        rows = np.resize(np.asarray([*admitted], np.int32), refill_size)
        indices = [admitted[int(row)] for row in rows]
        tokens, valid = pad_prompts([prompts[index] for index in indices], widest=widest)
        keys = jax.vmap(lambda n: jax.random.split(jax.random.fold_in(key, n), self._completions))(
            jnp.asarray(indices) + first
        )
        return self._loop.admit(params, state, rows, tokens, valid, keys)

    def _check(self, number: int, length: int) -> None:
        new, context = self._max_tokens, self._context
        if length == 0:
            raise UserError(
                f"prompt {number} has no tokens, so no position predicts the first sampled token: add text or a "
                "BOS token"
            )
        if length + new > context:
            remedies = [f"shorten the prompt to {context - new}"] if new < context else []
            remedies += [f"lower max_tokens to {context - length}"] if length < context else []
            raise UserError(
                f"prompt {number} has {length} tokens, which with max_tokens={new} exceed the model's context of "
                f"{context}: {' or '.join(remedies) or 'shorten the prompt and lower max_tokens'}"
            )


def _trim(completions: tuple[SampledTokens, np.ndarray], position: int) -> list[dict]:
    """The completions of one row, cut to their lengths."""
    sampled, lengths = completions
    return [
        {name: np.asarray(values[position, sample, :length]) for name, values in sampled._asdict().items()}
        for sample, length in enumerate(lengths[position].tolist())
    ]
