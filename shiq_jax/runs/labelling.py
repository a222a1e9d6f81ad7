"""The second buffer of losses on good and bad answers: labelled answers, and answers to other prompts."""

from __future__ import annotations

import sys
from pathlib import Path

from shiq_jax.errors import UserError
from shiq_jax.objectives import Objective
from shiq_jax.replay import Buffer
from shiq_jax.replay.labels import explicit_labels, labeled_records
from shiq_jax.runs.ingest import open_or_create


def check_threshold(answers: Buffer, threshold: float | None, data: str | None, *, private: bool = False) -> None:
    """Raises UserError for a threshold on data that have labels, and in a private run where there is neither.

    Args:
        answers: what the data became.
        threshold: of `label`.
        data: the source as the user named it.
        private: whether the run protects its data, so that no answer may be compared with the answers of other units.
    """
    known = explicit_labels(answers) >= 0
    if threshold is not None and known.any():
        raise UserError(f"--threshold says which scores are good, but {data} has labels: leave it out")
    if private and threshold is None and not known.all():
        raise UserError(
            "without labels or a --threshold an answer is compared with the mean of its prompt's answers, which belong "
            "to other units: give one of the two in a private run"
        )


def label(path: Path, answers: Buffer, objective: Objective, threshold: float | None, longest: int) -> Buffer:
    """A buffer of labelled answers, each followed by a mismatched one where the objective couples through these.

    Args:
        path: of the buffer, made in one atomic append when it is not there.
        answers: the answers with their labels or rewards.
        objective: reads labels.
        threshold: the return above which an answer without a label is good; None for the mean of its prompt's
            answers.
        longest: tokens of the longest sequence that can be learned from.

    Raises:
        UserError: there is nothing to learn from, see `replay.labels`.
    """
    buffer = open_or_create(path)
    if len(buffer):
        return buffer
    mismatched = objective.couple is not None
    added = buffer.append(labeled_records(answers, threshold, mismatched=mismatched, max_length=longest))
    examples, good = added // 2 if mismatched else added, buffer.column("label").count(True)
    tied = f"; {len(answers) - examples} tie and are left out" if examples < len(answers) else ""
    print(f"{good} answers are desirable, {examples - good} undesirable{tied}", file=sys.stderr)
    return buffer
