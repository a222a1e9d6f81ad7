"""Classification of data rows by their fields, and the commands that can train on them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from shiq_jax.data.answers import detect_layout


class Kind(NamedTuple):
    """Contents of a row; several may be true, because a row can suit several objectives.

    Attributes:
        tokens: a tokenized sequence.
        messages: a conversation to imitate.
        text: text to imitate.
        completion: a single answer, as text or messages.
        label: a label of its single sequence; False if a score field is selected.
        pair: a chosen and a rejected answer; False if a score field is selected.
        answers: several answers, including those of a pair.
        scored: rewards or scores.
        ranked: ranks of the answers.
    """

    tokens: bool
    messages: bool
    text: bool
    completion: bool
    label: bool
    pair: bool
    answers: bool
    scored: bool
    ranked: bool

    @property
    def labeled(self) -> bool:
        """Whether the row has a label, or chosen and rejected answers."""
        return self.label or self.pair

    @property
    def objectives(self) -> tuple[str, ...]:
        """The commands that can train on the row, the most specific first."""
        several = self.answers and not self.completion
        scored = self.scored and (self.tokens or self.completion or several)
        supported = {
            "dpo": self.pair or (several and (self.scored or self.ranked)),
            "shiq": scored,
            "kto": self.labeled or scored,
            "sft": self.completion or self.messages or self.text,
        }
        return tuple(name for name, is_supported in supported.items() if is_supported)


def classify(row: Mapping[str, Any], score: str | None = None) -> Kind:
    """Classify a row by its fields.

    Args:
        row: the row.
        score: name of a score field that takes precedence over labels and over `chosen` and `rejected`.
    """
    layout = detect_layout(row)
    tokens, completion = "tokens" in row, "completion" in row
    if tokens:
        scored = "rewards" in row
    elif completion:
        scored = (score or "reward") in row
    else:
        scored = layout.has_answers and (score is not None or layout.scored)
    return Kind(
        tokens=tokens,
        messages="messages" in row,
        text="text" in row,
        completion=completion,
        label=score is None and "label" in row and (tokens or completion),
        pair=score is None and layout.is_pair,
        answers=layout.has_answers,
        scored=scored,
        ranked=layout.ranked,
    )
