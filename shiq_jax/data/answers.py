"""Several answers to one prompt, with scores or ranks, in the spellings that preference data sets use.

    objects    {"instruction", "completions": [{"response", "fine-grained_score", ...}, ...]}   UltraFeedback
    lists      {"prompt", "responses": [...], "scores": [...]}                                  a score per answer
    pairs      {"prompt", "chosen", "rejected", "score_chosen", "score_rejected"}               UltraFeedback, binarised

Objects and lists may hold ranks, of which the smallest is the best. The tables below say which names are known. An
`instruction` is what a user says, so it is a message; a `prompt` is what the row says it is.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from shiq_jax.data.pairs import Messages, split_pair
from shiq_jax.errors import UserError

LISTS = ("completions", "responses", "answers", "generations", "all_generated_responses")
TEXTS = ("response", "completion", "answer", "generation", "text", "content")
FINE = "fine-grained_score"
# What holds the scores, the first name that a row knows; of pairs and lists with what belongs to it before or after.
SCORES = (FINE, "overall_score", "score", "rating", "avg_rating", "reward", "all_rm_score")
RANKS = ("rank", "ranks")

_SIDES = ("chosen", "rejected")
_PAIRED = ("{name}_{side}", "{side}_{name}", "{side}-{name}")
_LARGEST = float(np.finfo(np.float32).max)


class Answers(NamedTuple):
    """What a row says of `n` answers to its prompt.

    Attributes:
        row: the row without its answers; `prompt` is text or messages.
        texts: `n` answers, each a text, which may be empty, or messages.
        field: the name under which scores were found, None when the row has no scores.
        scores: `n` numbers, None for an answer without one; None when the row has no scores.
        ranks: `n` numbers, the smallest of the best answer, or None.
    """

    row: dict[str, Any]
    texts: list[str | Messages]
    field: str | None
    scores: list[float | None] | None
    ranks: list[float] | None


class Found(NamedTuple):
    """Where a row has its answers.

    Attributes:
        field: the list of answers, None where there is none.
        sides: whether its answers are a chosen and a rejected one; a list with scores or ranks counts more.
        scored, ranked: whether the answers have scores or ranks.
    """

    field: str | None
    sides: bool
    scored: bool
    ranked: bool

    @property
    def present(self) -> bool:
        """Whether the row has several answers."""
        return self.field is not None or self.sides


def find_answers(row: Mapping[str, Any]) -> Found:
    """Where the answers of a row are, by the names of its fields."""
    field, scored, ranked = _list_of(row)
    sides = all(side in row or f"{side}_response" in row for side in _SIDES) and not (scored or ranked)
    return Found(field, sides, _scores_of_pair(row, None)[0] is not None if sides else scored, ranked)


def split_answers(row: Mapping[str, Any], score: str | None = None) -> Answers:
    """The answers of a row that has several, with the scores of the field `score` (default: the first of SCORES).

    Where UltraFeedback's `fine-grained_score` is missing, it is the mean of those ratings in `annotations` that are
    numbers. Texts that are numbers count as numbers; null, NaN and other texts as none.

    Raises UserError when answers, scores and ranks do not belong together, or one of them cannot be what it should be.
    """
    name, sides, *_ = find_answers(row)
    if name is None or sides:
        return _split_pair(row, score)
    entries = row[name]
    if all(isinstance(entry, Mapping) for entry in entries):
        texts = [_text_of(entry, name, number) for number, entry in enumerate(entries, 1)]
        field, scores = _scores_of_objects(entries, score)
        ranks = [entry.get("rank") for entry in entries] if any("rank" in entry for entry in entries) else None
    elif all(isinstance(entry, str | list) for entry in entries):
        texts = list(entries)
        field, scores = _scores_of_lists(row, len(texts), score)
        ranks = next((_aligned(row, known, len(texts)) for known in RANKS if isinstance(row.get(known), list)), None)
    else:
        raise UserError(f"field {name!r} mixes texts with objects: expected a list of answers, all of one kind")
    return _answers(prompt_row(row), {name, field}, texts, field, scores, ranks, score)


def prompt_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with a `prompt`, where one can be told from its `instruction` or from both conversations of a pair."""
    pair = _as_pair(row)
    if all(isinstance(pair.get(side), list) for side in _SIDES):
        return pair | {"prompt": split_pair(pair)[0]}
    if "prompt" in row or not isinstance(row.get("instruction"), str):
        return dict(row)
    return row | {"prompt": [{"role": "user", "content": row["instruction"]}]}


def answer_text(answer: str | Messages) -> str:
    """The text of an answer that is a text, or one assistant's message; UserError for longer conversations."""
    if isinstance(answer, str):
        return answer
    if len(answer) == 1 and answer[0].get("role") == "assistant" and isinstance(answer[0].get("content"), str):
        return answer[0]["content"]
    roles = ", ".join(str(message.get("role")) for message in answer)
    raise UserError(
        f"an answer is a conversation with the roles {roles}, but a scoring function reads one text: give such rows "
        "rewards of their own, one per assistant turn"
    )


def _list_of(row: Mapping[str, Any]) -> tuple[str | None, bool, bool]:
    """The list of answers, and whether it has scores and ranks; one that has either before one that does not."""
    present = [name for name in LISTS if isinstance(row.get(name), list) and _like_answers(row[name])]
    compared = ((name, *_comparisons(row, row[name])) for name in present)
    plain = (present[0] if present else None, False, False)
    return next((found for found in compared if any(found[1:])), plain)


def _like_answers(entries: list) -> bool:
    """Whether something in a list is or has a text; a task's own `answers` may be the values that a checker wants."""
    return not entries or any(
        isinstance(entry, str | list) or (isinstance(entry, Mapping) and any(name in entry for name in TEXTS))
        for entry in entries
    )


def _comparisons(row: Mapping[str, Any], entries: list) -> tuple[bool, bool]:
    """Whether the answers of a list have scores, and whether they have ranks."""
    if not entries:
        return False, False
    if all(isinstance(entry, Mapping) for entry in entries):
        return _scores_of_objects(entries, None)[0] is not None, any("rank" in entry for entry in entries)
    scores = (*SCORES, *(score + "s" for score in SCORES))
    return tuple(any(isinstance(row.get(field), list) for field in known) for known in (scores, RANKS))


def _text_of(entry: Mapping[str, Any], name: str, number: int) -> str | Messages:
    for known in TEXTS:
        if isinstance(entry.get(known), str | list):
            return entry[known]
    raise UserError(
        f"field {name!r}, answer {number} has no text (found: {', '.join(map(str, entry)) or 'none'}): expected one of "
        f"{', '.join(TEXTS)}"
    )


def _scores_of_objects(entries: Sequence[Mapping], score: str | None) -> tuple[str | None, list | None]:
    for name in (score,) if score else SCORES:
        values = [_fine(entry) if name == FINE else entry.get(name) for entry in entries]
        if any(name in entry for entry in entries) or any(value is not None for value in values):
            return name, values
    return None, None


def _fine(entry: Mapping[str, Any]) -> Any:
    """UltraFeedback's mean rating; ratings are texts there, some of them N/A."""
    aspects = entry.get("annotations")
    if entry.get(FINE) is not None or not isinstance(aspects, Mapping):
        return entry.get(FINE)
    ratings = [_number(aspect.get("Rating"), "Rating") for aspect in aspects.values() if isinstance(aspect, Mapping)]
    numbers = [rating for rating in ratings if rating is not None]
    return sum(numbers) / len(numbers) if numbers else None


def _scores_of_lists(row: Mapping[str, Any], size: int, score: str | None) -> tuple[str | None, list | None]:
    for name in (score,) if score else SCORES:
        for form in (name, name + "s"):
            if isinstance(row.get(form), list):
                return form, _aligned(row, form, size)
    return None, None


def _split_pair(row: Mapping[str, Any], score: str | None) -> Answers:
    pair = _as_pair(row)
    prompt, *texts = split_pair(pair)
    return _answers(pair | {"prompt": prompt}, set(), texts, *_scores_of_pair(row, score), None, score)


def _scores_of_pair(row: Mapping[str, Any], score: str | None) -> tuple[str | None, list | None]:
    for name in (score,) if score else SCORES:
        for form in _PAIRED:
            fields = [form.format(name=name, side=side) for side in _SIDES]
            if any(field in row for field in fields):
                return name, [row.get(field) for field in fields]
    return None, None


def _as_pair(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with `chosen`, `rejected` and, from an `instruction`, `prompt`, where it spells them otherwise."""
    named = {side: row[f"{side}_response"] for side in _SIDES if side not in row and f"{side}_response" in row}
    if "prompt" not in row and isinstance(row.get("instruction"), str):
        named["prompt"] = [{"role": "user", "content": row["instruction"]}]
    return dict(row) | named


def _answers(row: dict, spent: set, texts: list, field: str | None, scores: list | None, ranks, score) -> Answers:
    """The parts together: the row without what is `spent`, scores and ranks as numbers."""
    if score is not None and scores is None:
        field, scores = score, [None] * len(texts)
    spent = spent | {*_SIDES, *(f"{side}_response" for side in _SIDES), "messages", "instruction"}
    kept = {name: value for name, value in row.items() if name not in spent}
    values = [_number(value, field) for value in scores] if scores is not None else None
    return Answers(kept, texts, field, values, _ranks(ranks) if ranks is not None else None)


def _aligned(row: Mapping[str, Any], name: str, size: int) -> list:
    if len(row[name]) != size:
        raise UserError(f"field {name!r} has {len(row[name])} entries for {size} answers: give one per answer")
    return row[name]


def _ranks(ranks: list) -> list[float]:
    numbers = [_number(rank, "rank") for rank in ranks]
    if None in numbers:
        raise UserError(
            f"the ranks of the answers are {json.dumps(ranks, default=str)[:60]}: expected a number for every answer"
        )
    return numbers


def _number(value: Any, name: str) -> float | None:
    """A number, None for what is none; UserError for one that no reward can be."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None if isinstance(value, str) else _too_large(value, name)
    if math.isnan(number):
        return None
    return number if abs(number) <= _LARGEST else _too_large(value, name)


def _too_large(value: Any, name: str) -> float:
    raise UserError(f"field {name!r} holds {str(value)[:60]}: expected finite numbers")
