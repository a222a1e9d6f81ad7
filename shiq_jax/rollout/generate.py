"""Sampling: any number of prompts through a fixed number of lanes, which are refilled as sequences end."""

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

# Rows that are refilled together, as a part of all: prompts are computed some at a time, and a row waits for them.
_TOGETHER = 8


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
    """Draws `samples_per_prompt` completions of each prompt, any number of prompts through lanes that never wait long.

    A prompt is computed once and holds a row until its completions are drawn; these go through the few lanes of the
    row, each lane taking the next as soon as one has ended, and the row takes the next prompt. So the cost follows the
    tokens that are drawn, not the longest completion.

    Args:
        model: supplies `init_cache`, `extend`, `init_branches`, `extend_branches` and `project`.
        sampling: how tokens are drawn.
        stop_tokens: ids that end a sequence.
        samples_per_prompt: completions of each prompt.
        prompts_in_flight: rows, the prompts that are worked on at once.
        lanes_per_prompt: completions of one prompt that are drawn at once; by default half of them: with fewer, the
            lanes of a row end nearer together; with more, a prompt's cache is read for more of them at once.
        greedy: each prompt has one completion more, its last, of the most likely tokens.
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
        self._engine = DecodeLoop(model, sampling, tuple(stop_tokens), self._completions, lanes, greedy)
        self._context = model.config.max_positions
        self._max_tokens = sampling.max_tokens

    def __call__(self, params, prompts: Sequence[Sequence[int]], key, first: int = 0) -> list[list[dict]]:
        """For each prompt its completions as dicts of numpy arrays `tokens, logp, lse, behaviour_logp`.

        `first` is the number of the first prompt: prompt i draws with `fold_in(key, first + i)`, whatever shares the
        lanes with it. Raises UserError, naming the prompt by that number, when one is empty or leaves no room for
        `max_tokens`.
        """
        found = dict(self.stream(params, prompts, key, first))
        return [found[number] for number in range(len(prompts))]

    def stream(self, params, prompts: Sequence[Sequence[int]], key, first: int = 0) -> Iterator[tuple[int, list[dict]]]:
        """(index of a prompt, its completions) as prompts are finished; otherwise as `__call__`."""
        for number, prompt in enumerate(prompts, first):
            self._check(number, len(prompt))
        if not prompts:
            return
        # Few sizes, for each is another program; a short list does not pay for rows that stay empty.
        rows = min(self.prompts_in_flight, 1 << (len(prompts) - 1).bit_length())
        together = max(1, rows // _TOGETHER)
        widest = self._context - self._max_tokens
        width = pad_prompts([max(prompts, key=len)], widest=widest)[0].shape[1]
        state = self._engine.start(params, rows, width)
        # Prompts of like length are computed together, so that little of it is padding.
        waiting = sorted(range(len(prompts)), key=lambda number: (len(prompts[number]), -number))
        holding: dict[int, int] = {}
        while waiting or holding:
            free = [row for row in range(rows) if row not in holding]
            while waiting and len(free) >= min(together, len(waiting)):
                taken = {free.pop(): waiting.pop() for _ in range(min(together, len(waiting)))}
                holding |= taken
                state = self._admit(params, state, taken, prompts, key, first, together, widest)
            state = self._engine.advance(params, state, rows - len(holding) + min(together, len(holding)))
            busy = hosts.gather(self._engine.busy(state))
            ended = [row for row in holding if not busy[row]]
            for start in range(0, len(ended), together):
                some = ended[start : start + together]
                padded = np.resize(np.asarray(some, np.int32), together)
                completions = hosts.gather(self._engine.take(state, padded))
                for place, row in enumerate(some):
                    yield holding.pop(row), _trimmed(completions, place)

    def _admit(self, params, state, taken: dict[int, int], prompts, key, first: int, together: int, widest: int):
        # A short list is filled up with its first entry, which does no harm twice.
        rows = np.resize(np.asarray([*taken], np.int32), together)
        numbers = [taken[int(row)] for row in rows]
        tokens, valid = pad_prompts([prompts[number] for number in numbers], widest=widest)
        keys = jax.vmap(lambda n: jax.random.split(jax.random.fold_in(key, n), self._completions))(
            jnp.asarray(numbers) + first
        )
        return self._engine.admit(params, state, rows, tokens, valid, keys)

    def _check(self, number: int, length: int) -> None:
        new, context = self._max_tokens, self._context
        if length == 0:
            raise UserError(
                f"prompt {number} has no tokens, so nothing predicts the first one that is drawn: give it some text, "
                "or the token that opens a text"
            )
        if length + new > context:
            ways = [f"shorten the prompt to {context - new}"] if new < context else []
            ways += [f"lower max_tokens to {context - length}"] if length < context else []
            raise UserError(
                f"prompt {number} has {length} tokens, which with max_tokens={new} exceed the model's context of "
                f"{context}: {' or '.join(ways) or 'shorten the prompt and lower max_tokens'}"
            )


def _trimmed(completions: tuple[SampledTokens, np.ndarray], place: int) -> list[dict]:
    drawn, lengths = completions
    return [
        {name: np.asarray(values[place, sample, :length]) for name, values in drawn._asdict().items()}
        for sample, length in enumerate(lengths[place].tolist())
    ]
