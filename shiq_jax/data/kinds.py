"""What a row of data holds, and which objectives learn from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from shiq_jax.data.answers import find_answers


class Kind(NamedTuple):
    """What a row holds. Several may be true, for a row may serve several objectives.

    Attributes:
        tokens: a tokenised sequence.
        messages: a conversation to be imitated.
        text: a text to be imitated.
        completion: one answer to its prompt, as text or messages.
        label: whether its one sequence is desirable, by which it is to be learned.
        pair: a chosen and a rejected answer, by which it is to be learned.
        answers: several answers to its prompt; those of a pair too.
        scored: rewards or scores of what it holds.
        ranked: ranks of its answers.
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
    def labelled(self) -> bool:
        """Whether it says which answer is desirable, by a label or by a side of a pair."""
        return self.label or self.pair

    @property
    def objectives(self) -> tuple[str, ...]:
        """The commands that learn from it, the most specific first."""
        several = self.answers and not self.completion
        scored = self.scored and (self.tokens or self.completion or several)
        suits = {
            "dpo": self.pair or (several and (self.scored or self.ranked)),
            "shiq": scored,
            "kto": self.labelled or scored,
            "sft": self.completion or self.messages or self.text,
        }
        return tuple(name for name, suited in suits.items() if suited)


def classify(row: Mapping[str, Any], score: str | None = None) -> Kind:
    """What a row holds, told from its fields.

    score: the field whose scores decide; labels and the sides of a pair then do not count.
    """
    found = find_answers(row)
    tokens, completion = "tokens" in row, "completion" in row
    if tokens:
        scored = "rewards" in row
    elif completion:
        scored = (score or "reward") in row
    else:
        scored = found.present and (score is not None or found.scored)
    return Kind(
        tokens=tokens,
        messages="messages" in row,
        text="text" in row,
        completion=completion,
        label=score is None and "label" in row and (tokens or completion),
        pair=score is None and found.sides,
        answers=found.present,
        scored=scored,
        ranked=found.ranked,
    )
