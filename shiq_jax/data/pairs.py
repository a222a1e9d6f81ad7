"""Separation of prompt and answers in preference pairs, in the formats of common preference datasets.

Answers are text or messages; messages are the answer alone or the full conversation including the prompt. The prompt is
text or messages; if it is missing, it is the shared beginning of both conversations.
"""

from __future__ import annotations

import json
import os
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from shiq_jax.errors import UserError

Messages = list[dict[str, Any]]


def split_pair(row: Mapping[str, Any]) -> tuple[str | Messages, str | Messages, str | Messages]:
    """Split a row with `chosen`, `rejected` and usually `prompt` into prompt, chosen answer and rejected answer.

    Text prompts become a user message unless the answers are text.

    Raises:
        UserError: a field is missing, the answers are of different types, or the conversations do not start with the
            prompt.
    """
    for name in ("chosen", "rejected"):
        if name not in row:
            raise UserError(
                f"field {name!r} is missing (found: {', '.join(map(str, row)) or 'none'}): expected an answer"
            )
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    if isinstance(chosen, str) and isinstance(rejected, str):
        return _split_texts(prompt, chosen, rejected)
    for name in ("chosen", "rejected"):
        if not _is_conversation(row[name]):
            raise UserError(
                f"field {name!r} is {json.dumps(row[name], default=str)[:60]}: expected both answers as text, or both "
                "as messages with role and content"
            )
    if prompt is None:
        return _split_shared(chosen, rejected)
    if isinstance(prompt, str):
        base = [{"role": "user", "content": prompt}]
    elif _is_conversation(prompt):
        base = list(prompt)
    else:
        raise UserError(
            "field 'prompt' is neither text nor messages: expected one of them, or no prompt with conversations"
        )
    if _starts_with(chosen, base) and _starts_with(rejected, base):
        return base, chosen[len(base) :], rejected[len(base) :]
    if chosen[0]["role"] == "assistant" and rejected[0]["role"] == "assistant":
        return base, chosen, rejected
    shared, chosen_answer, rejected_answer = _split_shared(chosen, rejected)
    # Conversations often start with a system message that a text prompt does not include.
    if not _starts_with(shared[-len(base) :], base):
        raise UserError(
            "fields 'chosen' and 'rejected' are conversations that do not begin with the prompt: expected the answers "
            "alone, or the prompt's messages followed by the answers"
        )
    return shared, chosen_answer, rejected_answer


def _split_texts(prompt: Any, chosen: str, rejected: str) -> tuple[str | Messages, str, str]:
    if prompt is None:
        shared = len(os.path.commonprefix([chosen, rejected]))
        # End the prompt at a word boundary, so that no token is split. A space is left to the answers, because most
        # tokenizers attach it to the following word. Both answers keep at least one character.
        shared = min(shared, len(chosen) - 1, len(rejected) - 1)
        words = shared
        while shared > 0 and not chosen[shared - 1].isspace():
            shared -= 1
        if not shared:
            # Languages without spaces: end at punctuation, or between ideographs.
            shared = words
            while shared > 0 and unicodedata.category(chosen[shared - 1])[:2] not in ("Lo", "Pe", "Po", "Ps"):
                shared -= 1
        if shared > 0 and chosen[shared - 1] == " ":
            shared -= 1
        if shared <= 0:
            raise UserError(
                "field 'prompt' is missing and the texts 'chosen' and 'rejected' share no beginning: add a prompt"
            )
        return chosen[:shared], chosen[shared:], rejected[shared:]
    if not isinstance(prompt, str) and not _is_conversation(prompt):
        raise UserError("field 'prompt' is neither text nor messages: expected one of them")
    return prompt, chosen, rejected


def _split_shared(chosen: Messages, rejected: Messages) -> tuple[Messages, Messages, Messages]:
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and _equal_messages(chosen[shared], rejected[shared]):
        shared += 1
    # The answers must start with an assistant turn.
    while shared and chosen[shared]["role"] != "assistant":
        shared -= 1
    if not shared:
        raise UserError(
            "field 'prompt' is missing and the conversations 'chosen' and 'rejected' share no first message: add a "
            "prompt"
        )
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _is_conversation(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(message, Mapping) and isinstance(message.get("role"), str) for message in value)
    )


def _starts_with(conversation: Sequence[Mapping], base: Sequence[Mapping]) -> bool:
    return len(conversation) >= len(base) > 0 and all(map(_equal_messages, conversation, base))


def _equal_messages(left: Mapping, right: Mapping) -> bool:
    return left.get("role") == right.get("role") and left.get("content") == right.get("content")
