"""Options and counts of a data import."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from shiq_jax.errors import UserError
from shiq_jax.replay.records import Record, validate


@dataclasses.dataclass
class ImportContext:
    """Options and counts of importing one source.

    Attributes:
        score: name of the score field; by default `reward`, or the first of `answers.SCORE_FIELDS` in the row.
        reward: reward function (row, answer text) -> reward for sources without scores.
        vocab_size: token ids must be less than this; None skips the check.
        accept: filter of valid records. It may raise UserError, to which the reader adds the location of the row.
        skipped: number of answers or prompts without a record, by reason.
        score_source: field of the first row that has scores, or "" for the reward function; None before the first row.
    """

    score: str | None = None
    reward: Callable[[Mapping[str, Any], str], float] | None = None
    vocab_size: int | None = None
    accept: Callable[[Record], bool] = lambda record: True
    skipped: Counter = dataclasses.field(default_factory=Counter)
    score_source: str | None = None

    def validate_and_accept(self, record: Record) -> bool:
        """Validate a record and return whether `accept` keeps it; raises UserError if it is invalid.

        Readers call this once per record; it is the only validation of imported records.
        """
        validate(record, self.vocab_size)
        return self.accept(record)

    def check_score_source(self, field: str | None, hint: str) -> bool:
        """Check that all rows take their scores from the same source; returns whether that is a field.

        Args:
            field: the field with the scores of the current row; None if `reward` computes them.
            hint: what to do if there are no scores and no `reward`, for the error message.

        Raises:
            UserError: there are no scores and no `reward`, or the source differs from that of previous rows.
        """
        if field is None and self.reward is None:
            raise UserError(f"the row has no scores: {hint}")
        if self.score_source is None:
            self.score_source = field or ""
        if self.score_source != (field or ""):
            previous, current = (repr(name) if name else "no field" for name in (self.score_source, field))
            raise UserError(
                f"previous rows have their scores in {previous}, but this row has them in {current}: use rows with "
                "scores on one scale, or select the field with --score"
            )
        return field is not None
