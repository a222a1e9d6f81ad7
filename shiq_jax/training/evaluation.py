"""What a policy is worth: reward of fresh samples and the distance it has gone from the reference."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from shiq_jax.errors import Refusal
from shiq_jax.replay import Record
from shiq_jax.rollout.collect import collect, decode
from shiq_jax.rollout.generate import Sampler, Sampling
from shiq_jax.training.annotation import statistics_of
from shiq_jax.training.reference import Reference


class Evaluated(NamedTuple):
    """What an evaluation found.

    Attributes:
        numbers: see `Evaluator.__call__`.
        records: the fresh samples.
        logratios: float64[samples], the summed log-ratio of each to the reference in nats; None without a reference.
    """

    numbers: dict[str, float]
    records: list[Record]
    logratios: np.ndarray | None


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
        prompts_per_batch: prompts of one compiled call.
        greedy: also decode every prompt greedily.
    """

    model: Any
    tokenizer: Any
    stop_tokens: tuple[int, ...]
    rows: Sequence[Mapping]
    reward: Callable[[Mapping, str], float] | None
    max_tokens: int
    samples_per_prompt: int = 1
    prompts_per_batch: int = 16
    greedy: bool = False

    def __post_init__(self):
        def sampler(temperature, samples):
            sampling = Sampling(temperature=temperature, max_tokens=self.max_tokens)
            return Sampler(
                self.model,
                sampling,
                self.stop_tokens,
                samples_per_prompt=samples,
                prompts_per_batch=self.prompts_per_batch,
            )

        object.__setattr__(self, "_sampler", sampler(1.0, self.samples_per_prompt))
        object.__setattr__(self, "_greedy", sampler(0.0, 1) if self.greedy else None)

    def __call__(self, params, reference: Reference | None, key) -> Evaluated:
        """Numbers of a policy, and the samples that they were taken from.

        Args:
            params: the policy.
            reference: what the KL is measured to; None when the policy is the reference itself, so that `kl` is 0.
            key: random key of the samples.

        Returns:
            `kl` in nats per sequence, the mean over fresh temperature-1 samples of the summed log-ratio to the
            reference; `length` in tokens; with a reward also `reward`, and `accuracy`, the share of samples whose
            reward is at least 1; all with a standard error over prompts (over samples when there is one prompt) in
            `..._stderr`; and, when asked for, `greedy_reward` and `greedy_accuracy`.

        Raises:
            Refusal: there is no prompt.
        """
        if not self.rows:
            raise Refusal("there is no prompt to evaluate on: give some, or leave the evaluation out")
        records = self._draw(self._sampler, params, key)
        out = {"length": float(np.mean([len(record.rewards) for record in records]))}
        if self.reward is not None:
            out |= self._scores(records, "")
        logratios = None
        if reference is not None:
            theirs = reference.statistics_of(records)
            ours = statistics_of(self.model, params, records)
            logratios = np.array([np.sum(our[0] - their[0]) for our, their in zip(ours, theirs, strict=True)])
        out |= self._mean("kl", np.zeros(len(records)) if logratios is None else logratios)
        if self.greedy and self.reward is not None:
            out |= self._scores(self._draw(self._greedy, params, key), "greedy_")
        return Evaluated(out, records, logratios)

    def shown(self, records: Sequence[Record]) -> list[dict]:
        """Samples as rows `prompt, completion, reward` of text."""
        rows = []
        for record in records:
            first = int(np.argmax(record.action_mask))
            rows.append(
                {
                    "prompt": self.tokenizer.decode(record.tokens[:first].tolist()),
                    "completion": decode(self.tokenizer, record.tokens[first:], self.stop_tokens),
                    "reward": float(record.rewards.sum()) if self.reward is not None else None,
                }
            )
        return rows

    def _scores(self, records: Sequence[Record], prefix: str) -> dict[str, float]:
        rewards = np.array([record.rewards.sum() for record in records])
        return self._mean(f"{prefix}reward", rewards) | self._mean(f"{prefix}accuracy", rewards >= 1)

    def _mean(self, name: str, values: np.ndarray) -> dict[str, float]:
        """Mean, and its standard error from the spread between prompts: samples of one prompt are not independent."""
        by_prompt = np.reshape(values, (len(self.rows), -1)).mean(axis=1)
        drawn = by_prompt if len(by_prompt) > 1 else np.asarray(values)
        error = np.std(drawn, ddof=1) / np.sqrt(len(drawn)) if len(drawn) > 1 else 0.0
        return {name: float(by_prompt.mean()), f"{name}_stderr": float(error)}

    def _draw(self, sampler: Sampler, params, key) -> list[Record]:
        reward = self.reward or (lambda row, completion: 0.0)
        return collect(sampler, params, self.tokenizer, self.rows, reward, key=key, stop_tokens=self.stop_tokens)
