"""Rows with several answers to one prompt, with scores or ranks, in the formats of common preference datasets.

    objects    {"instruction", "completions": [{"response", "fine-grained_score", ...}, ...]}   UltraFeedback
    lists      {"prompt", "responses": [...], "scores": [...]}                                  one score per answer
    pairs      {"prompt", "chosen", "rejected", "score_chosen", "score_rejected"}               UltraFeedback, binarized

Objects and lists may have ranks, where lower is better. The constants below list the recognized field names. An
`instruction` is converted to a user message; a `prompt` is text or messages.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from shiq_jax.data.pairs import Messages, split_pair
from shiq_jax.errors import UserError

LIST_FIELDS = ("completions", "responses", "answers", "generations", "all_generated_responses")
TEXT_FIELDS = ("response", "completion", "answer", "generation", "text", "content")
FINE_GRAINED = "fine-grained_score"
# Score fields in order of preference; lists may use the plural, and pairs add the side, see `_PAIR_FORMATS`.
SCORE_FIELDS = (FINE_GRAINED, "overall_score", "score", "rating", "avg_rating", "reward", "all_rm_score")
RANK_FIELDS = ("rank", "ranks")

_SIDES = ("chosen", "rejected")
_PAIR_FORMATS = ("{name}_{side}", "{side}_{name}", "{side}-{name}")
_MAX_FLOAT32 = float(np.finfo(np.float32).max)


class Answers(NamedTuple):
    """The `n` answers of a row.

    Attributes:
        row: the row without its answers; `prompt` is text or messages.
        texts: `n` answers, each text (possibly empty) or messages.
        field: name of the score field; None if the row has no scores.
        scores: `n` numbers, with None for answers without a score; None if the row has no scores.
        ranks: `n` numbers, lower is better; None if the row has no ranks.
    """

    row: dict[str, Any]
    texts: list[str | Messages]
    field: str | None
    scores: list[float | None] | None
    ranks: list[float] | None


class AnswerLayout(NamedTuple):
    """How a row stores its answers.

    Attributes:
        field: name of the list of answers; None if there is none.
        is_pair: whether the answers are `chosen` and `rejected`; a list with scores or ranks takes precedence.
        scored: whether the answers have scores.
        ranked: whether the answers have ranks.
    """

    field: str | None
    is_pair: bool
    scored: bool
    ranked: bool

    @property
    def has_answers(self) -> bool:
        """Whether the row has several answers."""
        return self.field is not None or self.is_pair


def detect_layout(row: Mapping[str, Any]) -> AnswerLayout:
    """Detect from its field names how a row stores its answers."""
    field, scored, ranked = _find_list(row)
    is_pair = all(side in row or f"{side}_response" in row for side in _SIDES) and not (scored or ranked)
    return AnswerLayout(field, is_pair, _pair_scores(row, None)[0] is not None if is_pair else scored, ranked)


def extract_answers(row: Mapping[str, Any], score: str | None = None) -> Answers:
    """Extract the answers of a row with several answers.

    A missing `fine-grained_score` is computed as the mean of the numeric ratings in UltraFeedback's `annotations`.
    Numeric strings are parsed; null, NaN and other strings count as missing scores.

    Args:
        row: the row.
        score: name of the score field; by default the first of SCORE_FIELDS in the row.

    Raises:
        UserError: the numbers of answers, scores and ranks differ, or one of them has an invalid type.
    """
    name, is_pair, *_ = detect_layout(row)
    if name is None or is_pair:
        return _extract_pair(row, score)
    entries = row[name]
    if all(isinstance(entry, Mapping) for entry in entries):
        texts = [_answer_of(entry, name, number) for number, entry in enumerate(entries, 1)]
        field, scores = _object_scores(entries, score)
        ranks = [entry.get("rank") for entry in entries] if any("rank" in entry for entry in entries) else None
    elif all(isinstance(entry, str | list) for entry in entries):
        texts = list(entries)
        field, scores = _list_scores(row, len(texts), score)
        ranks = next(
            (_check_aligned(row, field, len(texts)) for field in RANK_FIELDS if isinstance(row.get(field), list)), None
        )
    else:
        raise UserError(f"field {name!r} mixes text with objects: expected a list of answers of one type")
    return _make_answers(with_prompt(row), {name, field}, texts, field, scores, ranks, score)


def with_prompt(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with a `prompt` derived from its `instruction` or its `chosen` and `rejected` conversations, if any."""
    pair = _normalize_pair(row)
    if all(isinstance(pair.get(side), list) for side in _SIDES):
        return pair | {"prompt": split_pair(pair)[0]}
    if "prompt" in row or not isinstance(row.get("instruction"), str):
        return dict(row)
    return row | {"prompt": [{"role": "user", "content": row["instruction"]}]}


def answer_text(answer: str | Messages) -> str:
    """The text of an answer that is text or a single assistant message; raises UserError for longer conversations."""
    if isinstance(answer, str):
        return answer
    if len(answer) == 1 and answer[0].get("role") == "assistant" and isinstance(answer[0].get("content"), str):
        return answer[0]["content"]
    roles = ", ".join(str(message.get("role")) for message in answer)
    raise UserError(
        f"an answer is a conversation with the roles {roles}, but a reward function takes a single text: add a reward "
        "for each assistant turn to such rows"
    )


def _find_list(row: Mapping[str, Any]) -> tuple[str | None, bool, bool]:
    """Name of the list of answers, and whether it has scores and ranks; lists with either take precedence."""
    names = [name for name in LIST_FIELDS if isinstance(row.get(name), list) and _has_text(row[name])]
    candidates = ((name, *_has_scores_and_ranks(row, row[name])) for name in names)
    unscored = (names[0] if names else None, False, False)
    return next((candidate for candidate in candidates if any(candidate[1:])), unscored)


def _has_text(entries: list) -> bool:
    """Whether a list contains text; the `answers` of a task may instead be expected values for its checker."""
    return not entries or any(
        isinstance(entry, str | list) or (isinstance(entry, Mapping) and any(name in entry for name in TEXT_FIELDS))
        for entry in entries
    )


def _has_scores_and_ranks(row: Mapping[str, Any], entries: list) -> tuple[bool, bool]:
    """Whether the answers in a list have scores, and whether they have ranks."""
    if not entries:
        return False, False
    if all(isinstance(entry, Mapping) for entry in entries):
        return _object_scores(entries, None)[0] is not None, any("rank" in entry for entry in entries)
    score_fields = (*SCORE_FIELDS, *(score + "s" for score in SCORE_FIELDS))
    return tuple(any(isinstance(row.get(field), list) for field in fields) for fields in (score_fields, RANK_FIELDS))


def _answer_of(entry: Mapping[str, Any], name: str, number: int) -> str | Messages:
    for field in TEXT_FIELDS:
        if isinstance(entry.get(field), str | list):
            return entry[field]
    raise UserError(
        f"field {name!r}, answer {number} has no text (found: {', '.join(map(str, entry)) or 'none'}): expected one of "
        f"{', '.join(TEXT_FIELDS)}"
    )


def _object_scores(entries: Sequence[Mapping], score: str | None) -> tuple[str | None, list | None]:
    for name in (score,) if score else SCORE_FIELDS:
        values = [_fine_grained_score(entry) if name == FINE_GRAINED else entry.get(name) for entry in entries]
        if any(name in entry for entry in entries) or any(value is not None for value in values):
            return name, values
    return None, None


def _fine_grained_score(entry: Mapping[str, Any]) -> Any:
    """UltraFeedback's mean rating, computed from its string ratings if missing; some of these are N/A."""
    aspects = entry.get("annotations")
    if entry.get(FINE_GRAINED) is not None or not isinstance(aspects, Mapping):
        return entry.get(FINE_GRAINED)
    ratings = [
        _parse_number(aspect.get("Rating"), "Rating") for aspect in aspects.values() if isinstance(aspect, Mapping)
    ]
    numbers = [rating for rating in ratings if rating is not None]
    return sum(numbers) / len(numbers) if numbers else None


def _list_scores(row: Mapping[str, Any], size: int, score: str | None) -> tuple[str | None, list | None]:
    for name in (score,) if score else SCORE_FIELDS:
        for field in (name, name + "s"):
            if isinstance(row.get(field), list):
                return field, _check_aligned(row, field, size)
    return None, None


def _extract_pair(row: Mapping[str, Any], score: str | None) -> Answers:
    pair = _normalize_pair(row)
    prompt, *texts = split_pair(pair)
    return _make_answers(pair | {"prompt": prompt}, set(), texts, *_pair_scores(row, score), None, score)


def _pair_scores(row: Mapping[str, Any], score: str | None) -> tuple[str | None, list | None]:
    for name in (score,) if score else SCORE_FIELDS:
        for pattern in _PAIR_FORMATS:
            fields = [pattern.format(name=name, side=side) for side in _SIDES]
            if any(field in row for field in fields):
                return name, [row.get(field) for field in fields]
    return None, None


def _normalize_pair(row: Mapping[str, Any]) -> dict[str, Any]:
    """Rename `chosen_response`, `rejected_response` and `instruction` to `chosen`, `rejected` and `prompt`."""
    renamed = {side: row[f"{side}_response"] for side in _SIDES if side not in row and f"{side}_response" in row}
    if "prompt" not in row and isinstance(row.get("instruction"), str):
        renamed["prompt"] = [{"role": "user", "content": row["instruction"]}]
    return dict(row) | renamed


def _make_answers(row: dict, used: set, texts: list, field: str | None, scores: list | None, ranks, score) -> Answers:
    """Remove the `used` fields from the row, and parse scores and ranks."""
    if score is not None and scores is None:
        field, scores = score, [None] * len(texts)
    used = used | {*_SIDES, *(f"{side}_response" for side in _SIDES), "messages", "instruction"}
    kept = {name: value for name, value in row.items() if name not in used}
    values = [_parse_number(value, field) for value in scores] if scores is not None else None
    return Answers(kept, texts, field, values, _parse_ranks(ranks) if ranks is not None else None)


def _check_aligned(row: Mapping[str, Any], name: str, size: int) -> list:
    if len(row[name]) != size:
        raise UserError(f"field {name!r} has {len(row[name])} entries for {size} answers: give one per answer")
    return row[name]


def _parse_ranks(ranks: list) -> list[float]:
    numbers = [_parse_number(rank, "rank") for rank in ranks]
    if None in numbers:
        raise UserError(
            f"the ranks of the answers are {json.dumps(ranks, default=str)[:60]}: expected one number per answer"
        )
    return numbers


def _parse_number(value: Any, name: str) -> float | None:
    """Parse a number; None if the value is not one. Raises UserError if it does not fit into float32."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None if isinstance(value, str) else _too_large(value, name)
    if math.isnan(number):
        return None
    return number if abs(number) <= _MAX_FLOAT32 else _too_large(value, name)


def _too_large(value: Any, name: str) -> float:
    raise UserError(f"field {name!r} contains {str(value)[:60]}: expected finite numbers")
