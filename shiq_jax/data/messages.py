"""Conversations in one form: the roles, fields and content parts of other trainers and APIs become plain messages."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from shiq_jax.errors import UserError

ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "observation": "tool"}
CONVERSATIONS = ("prompt", "completion", "chosen", "rejected", "messages")
_ANSWERS = ("completion", "chosen", "rejected", "messages")
_MEDIA = ("image", "images", "video", "videos", "audio", "audios")


def normalize_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row with plain messages under the field names of `data.formats`.

    - `conversations` is `messages`, and `{"from", "value"}` is `{"role", "content"}` (ShareGPT).
    - `input.messages`, `preferred_output` and `non_preferred_output` are a preference (OpenAI).
    - `messages` beside `chosen` and `rejected` are the prompt, and an answer may be a single message (LLaMA-Factory).
    - `kto_tag` is `label`; with it, `messages` end with the answer that is labeled (LLaMA-Factory).
    - `system`, `history` (pairs of texts) and `input` belong to the prompt of an `instruction`, and `system` to any
      prompt (Alpaca and LLaMA-Factory).
    - Text parts of a message are joined, null fields of a message are dropped, and `tools` may be JSON text.

    Raises:
        UserError: naming the field and the message, for content other than text, an answer without content or tool
            calls, or a row with two spellings of one field.
    """
    tagged, row = "kto_tag" in row, _rename(row)
    for name in CONVERSATIONS:
        value = [row[name]] if isinstance(row.get(name), Mapping) and name in ("chosen", "rejected") else row.get(name)
        if isinstance(value, list) and value and all(isinstance(message, Mapping) for message in value):
            row[name] = [_message(message, name, number) for number, message in enumerate(value, 1)]
    _add_context(row)
    if isinstance(row.get("tools"), str):
        row["tools"] = _tools(row["tools"])
    if isinstance(row.get("messages"), list) and "prompt" not in row:
        if {"chosen", "rejected"} <= row.keys():
            row["prompt"] = row.pop("messages")
        elif tagged and row["messages"] and "completion" not in row:
            *row["prompt"], answer = row.pop("messages")
            row["completion"] = [answer]
    for name in _MEDIA:
        if row.get(name):
            raise UserError(f"field {name!r} holds media: only text is supported; remove the field to train without it")
    for name in _ANSWERS:
        if isinstance(row.get(name), list):
            _check_answers(row[name], name)
    return row


def argument_objects(message: Mapping) -> list[dict]:
    """The nonempty arguments of a message's tool calls, as objects."""
    calls = with_arguments(message, json.loads).get("tool_calls") or ()
    return [call["function"]["arguments"] for call in calls if _is_object(call) and call["function"]["arguments"]]


def _is_object(call: Any) -> bool:
    return isinstance(call, Mapping) and isinstance((call.get("function") or {}).get("arguments"), dict)


def with_arguments(message: Mapping, convert: Callable) -> dict:
    """A message whose tool calls have their arguments as objects (`json.loads`) or as JSON text (`json.dumps`)."""
    result = dict(message)
    if isinstance(message.get("tool_calls"), list):
        result["tool_calls"] = [_with_converted_arguments(call, convert) for call in message["tool_calls"]]
    return result


def _with_converted_arguments(call: Any, convert: Callable) -> Any:
    source = str if convert is json.loads else dict
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), source):
        return call
    try:
        return dict(call) | {"function": dict(function) | {"arguments": convert(function["arguments"])}}
    except ValueError:
        return call


def _add_context(row: dict[str, Any]) -> None:
    """Move `system`, `history` and `input` into the prompt or the conversation of the row."""
    system, history, text = (row.get(name) for name in ("system", "history", "input"))
    # Beside a prompt, `input` is one of the fields that a reward may read.
    text = text if "instruction" in row and "prompt" not in row else None
    for name, value, expected in (("system", system, str), ("history", history, list), ("input", text, str)):
        if value and not isinstance(value, expected):
            raise UserError(f"field {name!r} is of type {type(value).__name__}: expected {expected.__name__}")
    if not (system or history or text):
        return
    name = "prompt" if "prompt" in row else "instruction" if "instruction" in row else "messages"
    base = row.get(name)
    if isinstance(base, str):
        base = [{"role": "user", "content": "\n".join(part for part in (base, text) if part)}]
    if not isinstance(base, list) or not base or not all(isinstance(message, Mapping) for message in base):
        found = ", ".join(repr(field) for field in ("system", "history") if row.get(field))
        raise UserError(f"fields {found} belong to a prompt, but the row has none that they can be added to: add them")
    turns = [{"role": role, "content": content} for turn in history or () for role, content in _turn(turn)]
    if system and base[0].get("role") == "system":
        raise UserError(
            "field 'system' and a system message in the conversation are two names of one field: remove one"
        )
    start = [{"role": "system", "content": system}] if system else []
    row["messages" if name == "messages" else "prompt"] = [*start, *turns, *base]
    for merged in ("system", "history", *(("input", "instruction") if name == "instruction" else ())):
        row.pop(merged, None)


def _turn(turn: Any) -> list[tuple[str, str]]:
    if not (isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn)):
        raise UserError(f"field 'history' holds {json.dumps(turn, default=str)[:60]}: expected pairs of texts")
    return [("user", turn[0]), ("assistant", turn[1])]


def _rename(row: Mapping[str, Any]) -> dict[str, Any]:
    renamed = {"conversations": "messages", "kto_tag": "label"}
    if isinstance(row.get("input"), Mapping):
        renamed |= {"preferred_output": "chosen", "non_preferred_output": "rejected"}
        if isinstance(row["input"].get("messages"), list):
            row = {name: value for name, value in row.items() if name != "input"} | {"prompt": row["input"]["messages"]}
    result = dict(row)
    for old, new in renamed.items():
        if old in result:
            if new in result:
                raise UserError(f"fields {old!r} and {new!r} are two names of one field: remove one")
            result[new] = result.pop(old)
    return result


def _message(message: Mapping[str, Any], field: str, number: int) -> dict[str, Any]:
    """Role and content of one message under their usual names, without null fields."""
    names = {"from": "role", "value": "content"} if "from" in message and "role" not in message else {}
    result = {names.get(name, name): value for name, value in message.items() if value is not None}
    if isinstance(result.get("role"), str):
        result["role"] = ROLES.get(result["role"], result["role"])
    if not result.get("tool_calls", True):
        del result["tool_calls"]
    if isinstance(result.get("content"), list):
        result["content"] = "".join(_text(part, field, number) for part in result["content"])
    # Templates test the content of a message with tool calls in different ways; all accept an empty text.
    if "content" not in result and ("tool_calls" in result or "content" in message):
        result["content"] = ""
    return result


def _text(part: Any, field: str, number: int) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise UserError(f"field {field!r}, message {number} has content of type {kind!r}: only text is supported")


def _tools(text: str) -> Any:
    try:
        return json.loads(text) if text.strip() else None
    except ValueError as error:
        raise UserError(f"field 'tools' is text that is not JSON ({error}): give a list of functions") from error


def _check_answers(messages: list, field: str) -> None:
    last = messages[-1].get("role") if messages and isinstance(messages[-1], Mapping) else None
    if field in ("chosen", "rejected") and isinstance(last, str) and last != "assistant":
        raise UserError(
            f"field {field!r} ends with a message of the role {last!r}: expected an answer of the assistant"
        )
    for number, message in enumerate(messages, 1):
        if isinstance(message, Mapping) and message.get("role") == "assistant" and message.get("content") == "":
            if "tool_calls" not in message:
                raise UserError(
                    f"field {field!r}, message {number} is an answer without content or tool calls: remove the row"
                )
