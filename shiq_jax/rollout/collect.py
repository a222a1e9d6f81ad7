"""From prompts to records: sample, decode, score, keep."""

from __future__ import annotations

import json
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np

from shiq_jax.data.chat import encode_prompt
from shiq_jax.errors import UserError
from shiq_jax.replay import Record
from shiq_jax.rollout.generate import Sampler
from shiq_jax.rollout.rewards import describe


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
) -> Iterator[tuple[int, list[Record]]]:
    """Sampled records of some prompts: (index of a row, its answers, which form a group), as they are finished.

    The reward stands on the last action. Each record carries the sampler's raw statistics, the log-probability of the
    distribution that was sampled, and the row as JSON without its `tokens`, so that it can be scored again; what JSON
    does not know stands there as its text.

    Args:
        sampler: draws the completions.
        params: the policy.
        rows: prompt rows. `prompt` is text or messages, with `tools` for the chat template; where a row has `tokens`,
            these are the prompt as they are. `id` names the group, else `#` and the row's number do.
        reward: scores a completion's text with a finite number, see `shiq_jax.rollout.rewards`.
        first: number of the first row in the whole list; with `key` it fixes the random numbers.

    Raises UserError when a row has no prompt, or `tokens` that are no token ids.
    """
    prompts = [_encoded(tokenizer, row) for row in rows]
    for index, answers in sampler.stream(params, prompts, key, first):
        row, group = rows[index], _group(rows[index], first + index)
        texts = (decode(tokenizer, answer["tokens"], stop_tokens) for answer in answers)
        yield (
            index,
            [
                _record(row, group, prompts[index], answer, float(reward(row, text)))
                for answer, text in zip(answers, texts, strict=True)
            ],
        )


def in_order(found: Iterable[tuple[int, list[Record]]]) -> list[Record]:
    """What `collect` gave, in the order of the rows."""
    return [record for _, records in sorted(found, key=operator.itemgetter(0)) for record in records]


def sampled_tokens(records: Sequence[Record]) -> int:
    """How many tokens were drawn for some records."""
    return sum(len(record.rewards) for record in records)


def _encoded(tokenizer, row: Mapping) -> list[int]:
    if row.get("tokens") is None:
        if row.get("prompt") is None:
            raise UserError(f"{describe(row)} has neither 'prompt' nor 'tokens': give it one of them")
        return encode_prompt(tokenizer, row["prompt"], row.get("tools"))
    try:
        return [operator.index(token) for token in row["tokens"]]
    except TypeError as error:
        raise UserError(f"{describe(row)} has 'tokens' that are no integers: give token ids, or no 'tokens'") from error


def _group(row: Mapping, number: int) -> str:
    if row.get("id") is None:
        return f"#{number}"
    name = str(row["id"])
    # An id that looks like the number of a row gets a second sign, so that the two never meet.
    return f"#{name}" if name.startswith("#") else name


def _record(row: Mapping, group: str, prompt: Sequence[int], answer: Mapping, reward: float) -> Record:
    actions = len(answer["tokens"])
    rewards = np.zeros(actions, np.float32)
    rewards[-1] = reward
    kept = {name: value for name, value in row.items() if name != "tokens"}
    return Record(
        tokens=np.concatenate([np.asarray(prompt, np.int32), answer["tokens"].astype(np.int32)]),
        action_mask=np.arange(len(prompt) + actions) >= len(prompt),
        rewards=rewards,
        behaviour_logp=answer["behaviour_logp"].astype(np.float32),
        logp=answer["logp"].astype(np.float32),
        lse=answer["lse"].astype(np.float32),
        group=group,
        prompt=json.dumps(kept, ensure_ascii=False, default=str),
    )
