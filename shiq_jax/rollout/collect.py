"""From prompts to records: sample, decode, score, keep."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from shiq_jax.data.chat import encode_prompt
from shiq_jax.replay import Record
from shiq_jax.rollout.generate import Sampler


def decode(tokenizer, tokens: Sequence[int], stop_tokens: Sequence[int]) -> str:
    """The text of a completion, without the token that ended it."""
    tokens = [int(token) for token in tokens]
    if tokens and tokens[-1] in set(stop_tokens):
        tokens = tokens[:-1]
    return tokenizer.decode(tokens, skip_special_tokens=True)


def collect(
    sampler: Sampler,
    params,
    tokenizer,
    rows: Sequence[Mapping],
    reward: Callable[[Mapping, str], float],
    *,
    key,
    stop_tokens: Sequence[int],
    first: int = 0,
) -> list[Record]:
    """Sampled records of some prompts, in their order, each prompt's answers forming a group.

    The reward stands on the last action. Each record carries the sampler's raw statistics, the log-probability of the
    distribution that was sampled, and the row as JSON, so that it can be scored again.

    Args:
        sampler: draws the completions.
        params: the policy.
        rows: prompt rows; `id` names the group, else its number does.
        reward: scores a completion's text with a finite number, see `shiq_jax.rollout.rewards`.
        first: number of the first row in the whole list; with `key` it fixes the random numbers.
    """
    prompts = [encode_prompt(tokenizer, row["prompt"]) for row in rows]
    records = []
    for number, (row, prompt, answers) in enumerate(zip(rows, prompts, sampler(params, prompts, key, first)), first):
        for answer in answers:
            text = decode(tokenizer, answer["tokens"], stop_tokens)
            records.append(_record(row, str(row.get("id", number)), prompt, answer, float(reward(row, text))))
    return records


def _record(row: Mapping, group: str, prompt: Sequence[int], answer: Mapping, reward: float) -> Record:
    actions = len(answer["tokens"])
    rewards = np.zeros(actions, np.float32)
    rewards[-1] = reward
    return Record(
        tokens=np.concatenate([np.asarray(prompt, np.int32), answer["tokens"].astype(np.int32)]),
        action_mask=np.arange(len(prompt) + actions) >= len(prompt),
        rewards=rewards,
        behaviour_logp=answer["behaviour_logp"].astype(np.float32),
        logp=answer["logp"].astype(np.float32),
        lse=answer["lse"].astype(np.float32),
        group=group,
        prompt=json.dumps(row, ensure_ascii=False),
    )
