"""Evaluate a policy: reward of fresh samples and KL to the reference."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from shiq_jax import stopping
from shiq_jax.errors import UserError
from shiq_jax.progress import track
from shiq_jax.replay import Record
from shiq_jax.rollout.collect import collect_records, decode, records_in_order, sampled_tokens
from shiq_jax.rollout.generate import Sampler, Sampling
from shiq_jax.training.reference import Reference

# Generations to log per evaluation: always of the first prompts, so that evaluations can be compared.
LOGGED_PROMPTS, LOGGED_SAMPLES = 8, 2


class EvaluationResult(NamedTuple):
    """Result of an evaluation.

    Attributes:
        metrics: see `Evaluator.__call__`.
        records: the fresh samples, in the order of the prompts.
        logratios: float64[samples], log-ratio to the reference summed over each sample, in nats; None without a
            reference.
        greedy: the greedy answers to the same prompts; empty without greedy decoding.
        greedy_logratios: float64[greedy], log-ratios of the greedy answers; None without a reference.
    """

    metrics: dict[str, float]
    records: list[Record]
    logratios: np.ndarray | None
    greedy: list[Record]
    greedy_logratios: np.ndarray | None


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """Evaluates a policy on held-out prompts, with unfiltered samples at temperature 1.

    Args:
        model: the decoder.
        tokenizer: tokenizer of the model.
        stop_tokens: ids that end a completion.
        rows: held-out prompt rows.
        reward: (row, completion) -> reward; None measures only the KL.
        max_tokens: maximum completion length.
        samples_per_prompt: fresh samples per prompt.
        prompts_in_flight: prompts that are decoded at once.
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
        """Sample completions and compute the metrics of a policy.

        Args:
            params: the policy.
            reference: reference of the KL; None if the policy is the reference, then `kl` is 0.
            key: random key of the samples.
            prompts: number of prompts, from the first; None uses all.

        Returns:
            the samples and these metrics: `length`, the mean completion length in tokens; `kl` in nats per sequence,
            the mean over fresh samples of the summed log-ratio to the reference; with a reward also `reward` and
            `accuracy`, the fraction of samples with a reward of at least 1, and the same of the greedy answers as
            `greedy_reward` and `greedy_accuracy`. All except `length` have a standard error `..._stderr`, over prompts
            (over samples if there is one prompt).

        Raises:
            UserError: there are no prompts.
        """
        if not self.rows:
            raise UserError("there are no prompts to evaluate on: give at least one, or skip the evaluation")
        rows = self.rows[:prompts]
        records, greedy = self._sample(params, key, rows)
        logratios = _logratios(reference, records + greedy)
        sampled_logratios = None if logratios is None else logratios[: len(records)]
        greedy_logratios = None if logratios is None else logratios[len(records) :]

        metrics = {"length": float(np.mean([len(record.rewards) for record in records]))}
        metrics |= _mean("kl", np.zeros(len(records)) if logratios is None else sampled_logratios, len(rows))
        if self.reward is not None:
            metrics |= _reward_metrics(records, "", len(rows))
            metrics |= _reward_metrics(greedy, "greedy_", len(rows)) if greedy else {}
        return EvaluationResult(metrics, records, sampled_logratios, greedy, greedy_logratios)

    def generations(
        self, result: EvaluationResult, prompts: int | None = None, samples: int | None = None
    ) -> list[dict]:
        """The generations of an evaluation as rows of text, in the order of the prompts.

        Args:
            result: the evaluation.
            prompts: number of prompts, from the first; None returns all.
            samples: number of fresh samples per prompt; None returns all.

        Returns:
            rows of `prompt`, `decoding` ("sampled" or "greedy"), `completion`, `reward` (None without a reward
            function), `logratio` (nats, summed; None without a reference) and `tokens` (length of the completion).
        """
        rows = []
        for prompt_index in range(len(result.records) // self.samples_per_prompt)[:prompts]:
            start = prompt_index * self.samples_per_prompt
            sample_indices = range(start, start + self.samples_per_prompt)[:samples]
            rows += [self._row("sampled", result.records, result.logratios, index) for index in sample_indices]
            if prompt_index < len(result.greedy):
                rows.append(self._row("greedy", result.greedy, result.greedy_logratios, prompt_index))
        return rows

    def _row(self, decoding: str, records: Sequence[Record], logratios: np.ndarray | None, index: int) -> dict:
        record = records[index]
        prompt_length = int(np.argmax(record.action_mask))
        return {
            "prompt": self.tokenizer.decode(record.tokens[:prompt_length].tolist()),
            "decoding": decoding,
            "completion": decode(self.tokenizer, record.tokens[prompt_length:], self.stop_tokens),
            "reward": float(record.rewards.sum()) if self.reward is not None else None,
            "logratio": None if logratios is None else float(logratios[index]),
            "tokens": len(record.rewards),
        }

    def _sample(self, params, key, rows: Sequence[Mapping]) -> tuple[list[Record], list[Record]]:
        """Fresh samples and greedy answers, in the order of the prompts."""
        reward = self.reward or (lambda row, completion: 0.0)
        stream = collect_records(
            self._sampler, params, self.tokenizer, rows, reward, key=key, stop_tokens=self.stop_tokens
        )
        amount = ("tokens", lambda indexed_records: sampled_tokens(indexed_records[1]))
        finished = []
        for indexed_records in track(stream, "evaluation samples", len(rows), "prompts", amount=amount):
            finished.append(indexed_records)
            stopping.check("while evaluating")
        records, per_prompt = records_in_order(finished), self.samples_per_prompt + self.greedy
        samples = [record for index, record in enumerate(records) if index % per_prompt < self.samples_per_prompt]
        return samples, records[per_prompt - 1 :: per_prompt] if self.greedy else []


def _logratios(reference: Reference | None, records: Sequence[Record]) -> np.ndarray | None:
    """Log-ratio of each record, summed over its actions; the policy's `logp` is the one that the sampler stored."""
    if reference is None:
        return None
    statistics = reference.record_statistics(records)
    return np.array([np.sum(record.logp - logp) for record, (logp, _) in zip(records, statistics, strict=True)])


def _reward_metrics(records: Sequence[Record], prefix: str, prompts: int) -> dict[str, float]:
    rewards = np.array([record.rewards.sum() for record in records])
    return _mean(f"{prefix}reward", rewards, prompts) | _mean(f"{prefix}accuracy", rewards >= 1, prompts)


def _mean(name: str, values: np.ndarray, prompts: int) -> dict[str, float]:
    """Mean and its standard error over prompts, because samples of one prompt are not independent."""
    by_prompt = np.reshape(values, (prompts, -1)).mean(axis=1)
    independent = by_prompt if len(by_prompt) > 1 else np.asarray(values)
    stderr = np.std(independent, ddof=1) / np.sqrt(len(independent)) if len(independent) > 1 else 0.0
    return {name: float(by_prompt.mean()), f"{name}_stderr": float(stderr)}
