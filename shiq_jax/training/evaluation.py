"""What a policy is worth: reward of fresh samples and the distance it has gone from the reference."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from shiq_jax import stopping
from shiq_jax.errors import UserError
from shiq_jax.progress import track
from shiq_jax.replay import Record
from shiq_jax.rollout.collect import collect, decode, in_order, sampled_tokens
from shiq_jax.rollout.generate import Sampler, Sampling
from shiq_jax.training.reference import Reference

# Generations that are kept to be looked at: of the first prompts, so that evaluations can be compared.
SHOWN_PROMPTS, SHOWN_SAMPLES = 8, 2


class EvaluationResult(NamedTuple):
    """What an evaluation found.

    Attributes:
        numbers: see `Evaluator.__call__`.
        records: the fresh samples, prompt by prompt.
        logratios: float64[samples], the summed log-ratio of each to the reference in nats; None without a reference.
        greedy: the greedy answers to the same prompts; empty when there are none.
        greedy_logratios: float64[greedy], as `logratios`.
    """

    numbers: dict[str, float]
    records: list[Record]
    logratios: np.ndarray | None
    greedy: list[Record]
    greedy_logratios: np.ndarray | None


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """Scores a policy on held-out prompts.

    Args:
        model: the decoder.
        tokenizer, stop_tokens: of the model.
        rows: held-out prompt rows.
        reward: scores a completion's text; None when there is none, then only the KL is measured.
        sampling: temperature 1 and unfiltered for the KL to mean what it says; `max_tokens` is what matters here.
        samples_per_prompt: fresh samples of each prompt.
        prompts_in_flight: prompts that are worked on at once.
        greedy: also decode greedily.
    """

    model: Any
    tokenizer: Any
    stop_tokens: tuple[int, ...]
    rows: Sequence[Mapping]
    reward: Callable[[Mapping, str], float] | None
    max_tokens: int
    samples_per_prompt: int = 1
    prompts_in_flight: int = 32
    greedy: bool = False

    def __post_init__(self):
        sampler = Sampler(
            self.model,
            Sampling(max_tokens=self.max_tokens),
            self.stop_tokens,
            samples_per_prompt=self.samples_per_prompt,
            prompts_in_flight=self.prompts_in_flight,
            greedy=self.greedy,
        )
        object.__setattr__(self, "_sampler", sampler)

    def __call__(self, params, reference: Reference | None, key, prompts: int | None = None) -> EvaluationResult:
        """Numbers of a policy, and the samples that they were taken from.

        Args:
            params: the policy.
            reference: what the KL is measured to; None when the policy is the reference itself, so that `kl` is 0.
            key: random key of the samples.
            prompts: take only the first so many.

        Returns:
            `kl` in nats per sequence, the mean over fresh temperature-1 samples of the summed log-ratio to the
            reference; `length` in tokens; with a reward also `reward`, and `accuracy`, the share of samples whose
            reward is at least 1; all with a standard error over prompts (over samples when there is one prompt) in
            `..._stderr`; and, when asked for, `greedy_reward` and `greedy_accuracy`.

        Raises:
            UserError: there is no prompt.
        """
        if not self.rows:
            raise UserError("there is no prompt to evaluate on: give some, or leave the evaluation out")
        rows = self.rows[:prompts]
        records, greedy = self._draw(params, key, rows)
        logratios = _logratios(reference, records + greedy)
        sampled_logratios = None if logratios is None else logratios[: len(records)]
        greedy_logratios = None if logratios is None else logratios[len(records) :]

        out = {"length": float(np.mean([len(record.rewards) for record in records]))}
        out |= _mean("kl", np.zeros(len(records)) if logratios is None else sampled_logratios, len(rows))
        if self.reward is not None:
            out |= _scores(records, "", len(rows))
            out |= _scores(greedy, "greedy_", len(rows)) if greedy else {}
        return EvaluationResult(out, records, sampled_logratios, greedy, greedy_logratios)

    def shown(self, found: EvaluationResult, prompts: int | None = None, samples: int | None = None) -> list[dict]:
        """What an evaluation generated, prompt by prompt, as rows of text.

        Args:
            found: the evaluation.
            prompts: how many prompts, from the first; all by default.
            samples: how many of each prompt's fresh samples; all by default.

        Returns:
            rows of `prompt`, `decoding` ("sampled" or "greedy"), `completion`, `reward` (None without one), `logratio`
            (nats, summed; None without a reference) and `tokens` (how many were generated).
        """
        rows = []
        for number in range(len(found.records) // self.samples_per_prompt)[:prompts]:
            start = number * self.samples_per_prompt
            drawn = range(start, start + self.samples_per_prompt)[:samples]
            rows += [self._row("sampled", found.records, found.logratios, index) for index in drawn]
            if number < len(found.greedy):
                rows.append(self._row("greedy", found.greedy, found.greedy_logratios, number))
        return rows

    def _row(self, decoding: str, records: Sequence[Record], logratios: np.ndarray | None, index: int) -> dict:
        record = records[index]
        first = int(np.argmax(record.action_mask))
        return {
            "prompt": self.tokenizer.decode(record.tokens[:first].tolist()),
            "decoding": decoding,
            "completion": decode(self.tokenizer, record.tokens[first:], self.stop_tokens),
            "reward": float(record.rewards.sum()) if self.reward is not None else None,
            "logratio": None if logratios is None else float(logratios[index]),
            "tokens": len(record.rewards),
        }

    def _draw(self, params, key, rows: Sequence[Mapping]) -> tuple[list[Record], list[Record]]:
        """Fresh samples, and greedy answers, prompt by prompt."""
        reward = self.reward or (lambda row, completion: 0.0)
        answered = collect(self._sampler, params, self.tokenizer, rows, reward, key=key, stop_tokens=self.stop_tokens)
        amount = ("tokens", lambda found: sampled_tokens(found[1]))
        found = []
        for prompt in track(answered, "evaluation samples", len(rows), "prompts", amount=amount):
            found.append(prompt)
            stopping.check("while evaluating")
        records, each = in_order(found), self.samples_per_prompt + self.greedy
        samples = [record for number, record in enumerate(records) if number % each < self.samples_per_prompt]
        return samples, records[each - 1 :: each] if self.greedy else []


def _logratios(reference: Reference | None, records: Sequence[Record]) -> np.ndarray | None:
    """Summed, of what the sampler wrote down as it drew: a pass of the policy over its own samples tells no more."""
    if reference is None:
        return None
    theirs = reference.statistics_of(records)
    return np.array([np.sum(record.logp - their[0]) for record, their in zip(records, theirs, strict=True)])


def _scores(records: Sequence[Record], prefix: str, prompts: int) -> dict[str, float]:
    rewards = np.array([record.rewards.sum() for record in records])
    return _mean(f"{prefix}reward", rewards, prompts) | _mean(f"{prefix}accuracy", rewards >= 1, prompts)


def _mean(name: str, values: np.ndarray, prompts: int) -> dict[str, float]:
    """Mean, and its standard error from the spread between prompts: samples of one prompt are not independent."""
    by_prompt = np.reshape(values, (prompts, -1)).mean(axis=1)
    drawn = by_prompt if len(by_prompt) > 1 else np.asarray(values)
    error = np.std(drawn, ddof=1) / np.sqrt(len(drawn)) if len(drawn) > 1 else 0.0
    return {name: float(by_prompt.mean()), f"{name}_stderr": float(error)}
