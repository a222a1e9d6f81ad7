"""What a policy is worth: reward of fresh samples and the distance it has gone from the reference."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from shiq_jax.replay import Record
from shiq_jax.rollout.collect import collect, decode
from shiq_jax.rollout.generate import Sampler, Sampling
from shiq_jax.training.annotation import statistics_of


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
                self.model, sampling, self.stop_tokens, samples_per_prompt=samples, prompts_per_batch=self.prompts_per_batch
            )

        object.__setattr__(self, "_sampler", sampler(1.0, self.samples_per_prompt))
        object.__setattr__(self, "_greedy", sampler(0.0, 1) if self.greedy else None)

    def __call__(self, params, reference, key) -> tuple[dict[str, float], list[dict]]:
        """Numbers of a policy, and its samples as rows `prompt, completion, reward`.

        Args:
            params: the policy.
            reference: parameters of the reference, None when the policy is the reference (then `kl` is 0 by definition).
            key: random key of the samples.

        Returns:
            `kl` in nats per sequence, the mean over fresh temperature-1 samples of the summed log-ratio to the reference;
            `kl_stderr`; `length` in tokens; with a reward also `reward`, `reward_stderr` (over prompts) and, when asked for,
            `greedy_reward`.
        """
        records = self._draw(self._sampler, params, key)
        out = {"length": float(np.mean([len(record.rewards) for record in records]))}
        if self.reward is not None:
            by_prompt = np.reshape([record.rewards.sum() for record in records], (len(self.rows), -1)).mean(axis=1)
            out |= {"reward": float(by_prompt.mean()), "reward_stderr": _stderr(by_prompt)}
        logratios = np.zeros(len(records))
        if reference is not None:
            policy_logp, reference_logp = (
                np.array([stats[0].sum() for stats in statistics_of(self.model, weights, records)])
                for weights in (params, reference)
            )
            logratios = policy_logp - reference_logp
        out |= {"kl": float(logratios.mean()), "kl_stderr": _stderr(logratios)}
        if self.greedy and self.reward is not None:
            greedy = self._draw(self._greedy, params, key)
            out["greedy_reward"] = float(np.mean([record.rewards.sum() for record in greedy]))
        return out, [self._shown(record) for record in records]

    def _draw(self, sampler: Sampler, params, key) -> list[Record]:
        reward = self.reward or (lambda row, completion: 0.0)
        return collect(sampler, params, self.tokenizer, self.rows, reward, key=key, stop_tokens=self.stop_tokens)

    def _shown(self, record: Record) -> dict:
        completion = decode(self.tokenizer, record.tokens[record.action_mask], self.stop_tokens)
        prompt = self.tokenizer.decode(record.tokens[~record.action_mask].tolist())
        return {"prompt": prompt, "completion": completion, "reward": float(record.rewards.sum())}


def _stderr(values: np.ndarray) -> float:
    return float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0
