"""Someone's data as records: scored trajectories, preferences, demonstrations; and prompts.

    trajectories    {"prompt", "completion", "reward"}           reward: a number, or a list with one per assistant turn
                    {"tokens", "action_mask", "rewards"}         one entry per token; optional logp, lse, behaviour_logp
    preferences     {"prompt", "chosen", "rejected"}             answers, or whole conversations, as in TRL
    demonstrations  {"prompt", "completion"} or {"messages"} or {"text"}
    prompts         {"prompt", ...}                              other fields are for the reward

A prompt is text or messages, a completion is text or the messages that follow. Optional everywhere: `group_id`
(default: rows with one prompt form a group), `user_id`, and `tools` for chat templates that take them.
`files.located_rows` says which files, directories and hub ids can be read; every complaint names the row's place and
field.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from shiq_jax.data.chat import Encoded, encode_completion, encode_text
from shiq_jax.data.files import located_rows, read_jsonl, rows
from shiq_jax.data.pairs import split_pair
from shiq_jax.errors import Refusal
from shiq_jax.replay.export import record_from_json
from shiq_jax.replay.records import STATISTICS, Record, validate

_LARGEST_REWARD = float(np.finfo(np.float32).max)

__all__ = ["demonstrations", "preferences", "prompts", "read_jsonl", "rows", "trajectories"]


def trajectories(source: str | Path, tokenizer) -> Iterator[Record]:
    """Records of scored sequences: text with `reward`, or tokens with `action_mask` and `rewards`; both may be mixed.

    A number as reward stands on the last action; a list stands on the last action of each assistant turn, in order.
    Raises Refusal naming the row and the field that is missing or wrong.
    """
    for place, row in located_rows(source):
        with _at(place):
            yield _from_tokens(row) if "tokens" in row else _from_scored_text(row, tokenizer)


def preferences(source: str | Path, tokenizer) -> Iterator[Record]:
    """Two records of one group for every preference: the chosen answer with reward 1, then the rejected one with 0.

    Conversational answers may be given alone or with the whole conversation before them; without `prompt`, what both
    share at the beginning is the prompt. Every row is a group of its own, also when its prompt occurs again.
    """
    for number, (place, row) in enumerate(located_rows(source)):
        with _at(place):
            prompt, chosen, rejected = split_pair(row)
            group = _digest([number, prompt, chosen, rejected])
            kept = row | {"prompt": prompt}
            for name, answer, reward in (("chosen", chosen, 1.0), ("rejected", rejected, 0.0)):
                _check_text(name, answer)
                yield _record(kept, _encode(tokenizer, kept, answer), [reward], group)


def demonstrations(source: str | Path, tokenizer) -> Iterator[Record]:
    """Records without rewards, for the supervised loss.

    `prompt` and `completion`: the completion's actions count. `messages`: every assistant turn counts. `text`:
    everything counts but its first token, which nothing predicts.
    """
    for place, row in located_rows(source):
        with _at(place):
            if "messages" in row:
                row = row | _split_conversation(row["messages"])
            if "text" in row and "completion" not in row:
                _check_text("text", row["text"])
                yield _record(
                    row, encode_text(tokenizer, row["text"]), [0.0], str(row.get("group_id", _digest(row["text"])))
                )
            else:
                _check_prompt(row)
                _check_text("completion", _field(row, "completion", "the answer that is to be imitated"))
                yield _record(row, _encode(tokenizer, row, row["completion"]), [0.0], _group(row))


def prompts(source: str | Path) -> list[dict[str, Any]]:
    """All rows of a source, each with a `prompt` that is text or messages; its other fields are kept for the reward."""
    found = []
    for place, row in located_rows(source):
        with _at(place):
            _check_prompt(row)
        found.append(row)
    return found


@contextlib.contextmanager
def _at(place: str) -> Iterator[None]:
    """Put the place of a row in front of what is wrong with it."""
    try:
        yield
    except ValueError as error:
        raise Refusal(f"{place}: {error}") from error


def _from_tokens(row: Mapping[str, Any]) -> Record:
    # A dataset made from a buffer keeps per-action columns compact and calls the group by its field's name.
    if "group" in row and "group_id" not in row:
        fields = ("tokens", "action_mask", "rewards", *STATISTICS, "group", "prompt", "user")
        missing = [name for name in fields[:3] if name not in row]
        if missing:
            raise Refusal(
                f"field {missing[0]!r} is missing: a row with 'tokens' also needs 'action_mask' and 'rewards'"
            )
        record = Record(**{name: row[name] for name in fields if name in row})
        validate(record)
        return record
    return record_from_json(row)


def _from_scored_text(row: Mapping[str, Any], tokenizer) -> Record:
    _check_prompt(row)
    _check_text("completion", _field(row, "completion", "the answer whose reward this is"))
    reward = _field(row, "reward", "a number, or a list with one number per assistant turn")
    encoded = _encode(tokenizer, row, row["completion"])
    turns = len(encoded.turn_ends)
    values = reward if isinstance(reward, list) else [reward]
    if isinstance(reward, list) and len(reward) != turns:
        raise Refusal(
            f"field 'reward' has {len(reward)} entries, but the completion has {turns} assistant turns: give one "
            "number per turn, or a single number for all"
        )
    for value in values:
        if not isinstance(value, int | float) or not abs(value) <= _LARGEST_REWARD:
            raise Refusal(f"field 'reward' holds {json.dumps(value, default=str)[:60]}: expected finite numbers")
    return _record(row, encoded, values, _group(row))


def _encode(tokenizer, row: Mapping[str, Any], completion: Any) -> Encoded:
    return encode_completion(tokenizer, row["prompt"], completion, row.get("tools"))


def _record(row: Mapping[str, Any], encoded: Encoded, rewards: list[float], group: str) -> Record:
    """A record with rewards on the ends of the last `len(rewards)` turns; it keeps the row without its answers."""
    per_token = np.zeros(len(encoded.tokens), np.float32)
    per_token[encoded.turn_ends[-len(rewards) :]] = rewards
    dropped = ("completion", "reward", "chosen", "rejected", "messages", "group_id", "user_id", "text")
    kept = {name: value for name, value in row.items() if name not in dropped}
    record = Record(
        tokens=encoded.tokens,
        action_mask=encoded.action_mask,
        rewards=per_token[encoded.action_mask],
        group=group,
        prompt=json.dumps(kept, ensure_ascii=False, default=str) if "prompt" in kept else None,
        user=str(row["user_id"]) if "user_id" in row else None,
    )
    validate(record)
    return record


def _field(row: Mapping[str, Any], name: str, meaning: str) -> Any:
    if name not in row:
        raise Refusal(f"field {name!r} is missing (found: {', '.join(map(str, row)) or 'none'}): expected {meaning}")
    return row[name]


def _check_prompt(row: Mapping[str, Any]) -> None:
    prompt = _field(row, "prompt", "text, or a list of messages")
    if isinstance(prompt, str):
        return
    _check_messages("prompt", prompt)


def _check_text(name: str, value: Any) -> None:
    """A completion: text that is not empty, or messages."""
    if isinstance(value, str):
        if not value:
            raise Refusal(f"field {name!r} is empty: expected text, or leave the row out")
        return
    _check_messages(name, value)


def _check_messages(name: str, value: Any) -> None:
    if not isinstance(value, list) or not value:
        found = f"of type {type(value).__name__}" if not isinstance(value, list) else "an empty list"
        raise Refusal(f"field {name!r} is {found}: expected text, or a list of messages with role and content")
    for number, message in enumerate(value, 1):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise Refusal(f'field {name!r}, message {number} has no \'role\': expected {{"role": ..., "content": ...}}')
        if "content" not in message and "tool_calls" not in message:
            raise Refusal(
                f'field {name!r}, message {number} has no \'content\': expected {{"role": ..., "content": ...}}'
            )


def _split_conversation(messages: Any) -> dict[str, Any]:
    _check_messages("messages", messages)
    roles = [message["role"] for message in messages]
    if "assistant" not in roles or roles.index("assistant") == 0:
        raise Refusal(
            f"field 'messages' has the roles {', '.join(roles)}: expected a user's message and an assistant's answer "
            "to it"
        )
    first = roles.index("assistant")
    return {"prompt": messages[:first], "completion": messages[first:]}


def _group(row: Mapping[str, Any]) -> str:
    return str(row["group_id"]) if "group_id" in row else _digest([row["prompt"], row.get("tools")])


def _digest(value: Any) -> str:
    content = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()[:16]
