"""The options of a reader of data files, and what it counts."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from shiq_jax.errors import UserError
from shiq_jax.replay.records import Record, validate


@dataclasses.dataclass
class ImportContext:
    """The options with which one source is read, and what was left out of it.

    Attributes:
        score: the field that holds scores; by default `reward`, or the first of `answers.SCORES` that a row knows.
        reward: scores the text of an answer to a row, for sources without scores.
        vocab_size: when given, token ids must lie below it.
        accept: whether a valid record is wanted; it may raise UserError, to which the row's place is added.
        left_out: how many answers or prompts gave no record, by reason.
        scale: where the scores of the source stand, settled by its first row: a field, or "" for `reward`.
    """

    score: str | None = None
    reward: Callable[[Mapping[str, Any], str], float] | None = None
    vocab_size: int | None = None
    accept: Callable[[Record], bool] = lambda record: True
    left_out: Counter = dataclasses.field(default_factory=Counter)
    scale: str | None = None

    def wanted(self, record: Record) -> bool:
        """Whether a record that was read is wanted; raises UserError when it is not valid.

        Every reader asks this of each record that it made, once; nothing else validates them.
        """
        validate(record, self.vocab_size)
        return self.accept(record)

    def settle(self, field: str | None, otherwise: str) -> bool:
        """Whether scores stand in `field`; if in None, `reward` gives them. All rows of a source must agree.

        Raises UserError when there are no scores and no `reward`, `otherwise` being what to do then, or when rows differ.
        """
        if field is None and self.reward is None:
            raise UserError(f"the row has no scores: {otherwise}")
        if self.scale is None:
            self.scale = field or ""
        if self.scale != (field or ""):
            names = [repr(name) if name else "no field" for name in (self.scale, field)]
            raise UserError(
                f"the scores of rows before this one stand in {names[0]}, of this one in {names[1]}: give rows whose "
                "scores are on one scale, or name the field of all with --score"
            )
        return field is not None
