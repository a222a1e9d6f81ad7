"""What is prompt and what is answer in a preference, in the spellings that preference data sets use.

Answers are text or messages; messages hold the answer alone, or the whole conversation with the prompt at its head; the
prompt may be text, messages, or absent, and is then what both conversations share.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from shiq_jax.errors import UserError

Messages = list[dict[str, Any]]


def split_pair(row: Mapping[str, Any]) -> tuple[str | Messages, str | Messages, str | Messages]:
    """Prompt, chosen answer and rejected answer of a row with `chosen`, `rejected` and, as a rule, `prompt`.

    The prompt comes back as text only when the answers are text. Raises UserError when a field is missing, the kinds do
    not go together, or whole conversations do not continue the prompt.
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
            "field 'prompt' is neither text nor messages: expected one of them, or no prompt beside conversations"
        )
    if _continues(chosen, base) and _continues(rejected, base):
        return base, chosen[len(base) :], rejected[len(base) :]
    if chosen[0]["role"] == "assistant" and rejected[0]["role"] == "assistant":
        return base, chosen, rejected
    shared, first, second = _split_shared(chosen, rejected)
    # A system message is often put in front of a prompt that is given as text.
    if not _continues(shared[-len(base) :], base):
        raise UserError(
            "fields 'chosen' and 'rejected' are conversations that do not begin with the prompt: expected the answers "
            "alone, or the prompt's messages and then the answers"
        )
    return shared, first, second


def _split_texts(prompt: Any, chosen: str, rejected: str) -> tuple[str | Messages, str, str]:
    if prompt is None:
        shared = len(os.path.commonprefix([chosen, rejected]))
        # The shared part ends at a word, so that no token is cut in two; both answers keep at least a character. A
        # space goes to the answers, for most vocabularies write a word with the space before it.
        shared = min(shared, len(chosen) - 1, len(rejected) - 1)
        while shared > 0 and not chosen[shared - 1].isspace():
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
    while shared < min(len(chosen), len(rejected)) - 1 and _same(chosen[shared], rejected[shared]):
        shared += 1
    # What comes after the prompt begins with the assistant.
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


def _continues(conversation: Sequence[Mapping], base: Sequence[Mapping]) -> bool:
    return len(conversation) >= len(base) > 0 and all(map(_same, conversation, base))


def _same(one: Mapping, other: Mapping) -> bool:
    return one.get("role") == other.get("role") and one.get("content") == other.get("content")
