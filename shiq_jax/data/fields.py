"""Checks of the fields of a row; each UserError names the field, what was found, and what was expected."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shiq_jax.errors import UserError


def field(row: Mapping[str, Any], name: str, meaning: str) -> Any:
    """The field `name`; raises UserError with its meaning when it is missing."""
    if name not in row:
        raise UserError(f"field {name!r} is missing (found: {', '.join(map(str, row)) or 'none'}): expected {meaning}")
    return row[name]


def check_prompt(row: Mapping[str, Any]) -> None:
    """Raises UserError unless the row has a prompt of text or messages."""
    prompt = field(row, "prompt", "text, or a list of messages")
    if isinstance(prompt, str):
        return
    check_messages("prompt", prompt)


def check_text(name: str, value: Any) -> None:
    """Raises UserError unless a completion is text that is not empty, or messages."""
    if isinstance(value, str):
        if not value:
            raise UserError(f"field {name!r} is empty: expected text, or leave the row out")
        return
    check_messages(name, value)


def check_messages(name: str, value: Any) -> None:
    """Raises UserError unless a field is a list of messages with role and content."""
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
    """The prompt and the completion of a conversation, cut before its first assistant turn."""
    check_messages("messages", messages)
    roles = [message["role"] for message in messages]
    if "assistant" not in roles or roles.index("assistant") == 0:
        raise UserError(
            f"field 'messages' has the roles {', '.join(roles)}: expected a user's message and an assistant's answer "
            "to it"
        )
    first = roles.index("assistant")
    return {"prompt": messages[:first], "completion": messages[first:]}
