"""Checks of the fields of a data row; errors name the field, its value and the expected format."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shiq_jax.errors import UserError


def require_field(row: Mapping[str, Any], name: str, expected: str) -> Any:
    """Return the field `name`; raises UserError if it is missing.

    Args:
        row: the row.
        name: name of the field.
        expected: description of the field for the error message.
    """
    if name not in row:
        raise UserError(f"field {name!r} is missing (found: {', '.join(map(str, row)) or 'none'}): expected {expected}")
    return row[name]


def check_prompt(row: Mapping[str, Any]) -> None:
    """Raise UserError unless the row has a `prompt` that is text or messages."""
    prompt = require_field(row, "prompt", "text, or a list of messages")
    if isinstance(prompt, str):
        return
    check_messages("prompt", prompt)


def check_completion(name: str, value: Any) -> None:
    """Raise UserError unless the value of field `name` is non-empty text or messages."""
    if isinstance(value, str):
        if not value:
            raise UserError(f"field {name!r} is empty: expected text; remove the row if it has none")
        return
    check_messages(name, value)


def check_messages(name: str, value: Any) -> None:
    """Raise UserError unless the value of field `name` is a list of messages with role and content."""
    if not isinstance(value, list) or not value:
        found = f"of type {type(value).__name__}" if not isinstance(value, list) else "an empty list"
        raise UserError(f"field {name!r} is {found}: expected text, or a list of messages with role and content")
    for number, message in enumerate(value, 1):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise UserError(
                f'field {name!r}, message {number} has no \'role\': expected {{"role": ..., "content": ...}}'
            )
        if "content" not in message and "tool_calls" not in message:
            raise UserError(
                f'field {name!r}, message {number} has no \'content\': expected {{"role": ..., "content": ...}}'
            )


def split_conversation(messages: Any) -> dict[str, Any]:
    """Split a conversation before its first assistant turn into `prompt` and `completion`."""
    check_messages("messages", messages)
    roles = [message["role"] for message in messages]
    if "assistant" not in roles or roles.index("assistant") == 0:
        raise UserError(
            f"field 'messages' has the roles {', '.join(roles)}: expected a user message followed by an assistant "
            "message"
        )
    first = roles.index("assistant")
    return {"prompt": messages[:first], "completion": messages[first:]}
