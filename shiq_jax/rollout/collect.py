"""Sample completions of prompts, score them and build records."""

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
    """The text of a completion, without the stop token at its end."""
    tokens = [int(token) for token in tokens]
    if tokens and tokens[-1] in set(stop_tokens):
        tokens = tokens[:-1]
    return tokenizer.decode(tokens, skip_special_tokens=True)


def collect_records(
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
    """Yield (row index, records) in the order in which prompts finish; the records of one prompt form a group.

    The reward is placed on the last action. Each record has the sampler's raw statistics, `behaviour_logp`, and the
    row without its `tokens` as JSON, so that it can be scored again; values that JSON cannot represent are converted to
    strings.

    Args:
        sampler: samples the completions.
        params: the policy.
        tokenizer: tokenizer of the model.
        rows: prompt rows. `prompt` is text or messages, with optional `tools` for the chat template; `tokens`, if
            present, are used as the prompt instead. `id` names the group; the default is `#` and the row's number.
        reward: (row, completion) -> finite number, see `shiq_jax.rollout.rewards`.
        key: random key.
        stop_tokens: ids that end a completion.
        first: number of the first row if `rows` is part of a longer list; random numbers depend on it and `key` only.

    Raises:
        UserError: a row has no prompt, or `tokens` that are not integers.
    """
    prompts = [_encode(tokenizer, row) for row in rows]
    for index, answers in sampler.stream(params, prompts, key, first):
        row, group = rows[index], _group_id(rows[index], first + index)
        texts = (decode(tokenizer, answer["tokens"], stop_tokens) for answer in answers)
        yield (
            index,
            [
                _record(row, group, prompts[index], answer, float(reward(row, text)))
                for answer, text in zip(answers, texts, strict=True)
            ],
        )


def records_in_order(indexed_records: Iterable[tuple[int, list[Record]]]) -> list[Record]:
    """The records that `collect_records` yields, in the order of the rows."""
    return [record for _, records in sorted(indexed_records, key=operator.itemgetter(0)) for record in records]


def sampled_tokens(records: Sequence[Record]) -> int:
    """Total number of sampled tokens of the records."""
    return sum(len(record.rewards) for record in records)


def _encode(tokenizer, row: Mapping) -> list[int]:
    if row.get("tokens") is None:
        if row.get("prompt") is None:
            raise UserError(f"{describe(row)} has neither 'prompt' nor 'tokens': add one of them")
        return encode_prompt(tokenizer, row["prompt"], row.get("tools"))
    try:
        return [operator.index(token) for token in row["tokens"]]
    except TypeError as error:
        raise UserError(
            f"{describe(row)} has 'tokens' that are not integers: give token ids, or remove 'tokens'"
        ) from error


def _group_id(row: Mapping, row_number: int) -> str:
    if row.get("id") is None:
        return f"#{row_number}"
    row_id = str(row["id"])
    # Escape ids that start with "#", so that they never equal a row number.
    return f"#{row_id}" if row_id.startswith("#") else row_id


def _record(row: Mapping, group: str, prompt: Sequence[int], answer: Mapping, reward: float) -> Record:
    actions = len(answer["tokens"])
    rewards = np.zeros(actions, np.float32)
    rewards[-1] = reward
    row_without_tokens = {name: value for name, value in row.items() if name != "tokens"}
    return Record(
        tokens=np.concatenate([np.asarray(prompt, np.int32), answer["tokens"].astype(np.int32)]),
        action_mask=np.arange(len(prompt) + actions) >= len(prompt),
        rewards=rewards,
        behaviour_logp=answer["behaviour_logp"].astype(np.float32),
        logp=answer["logp"].astype(np.float32),
        lse=answer["lse"].astype(np.float32),
        group=group,
        prompt=json.dumps(row_without_tokens, ensure_ascii=False, default=str),
    )
