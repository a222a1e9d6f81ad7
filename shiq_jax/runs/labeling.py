"""Replay buffer of labeled answers for KTO and similar losses, with mismatched answers for the KL estimate."""

from __future__ import annotations

import sys
from pathlib import Path

from shiq_jax.errors import UserError
from shiq_jax.objectives import Objective
from shiq_jax.replay import Buffer
from shiq_jax.replay.labels import explicit_labels, labeled_records
from shiq_jax.runs.ingest import open_or_create


def check_threshold(answers: Buffer, threshold: float | None, data: str | None, *, private: bool = False) -> None:
    """Check that a threshold is set only for data without labels, and that a private run does not need a group mean.

    Args:
        answers: the answers with their labels or rewards.
        threshold: see `label`.
        data: name of the data source, for the message.
        private: whether the run is private, so that answers of different units must not be compared.

    Raises:
        UserError: the threshold conflicts with the data or with a private run.
    """
    has_label = explicit_labels(answers) >= 0
    if threshold is not None and has_label.any():
        raise UserError(f"--threshold applies to scores, but {data} already has labels: omit --threshold")
    if private and threshold is None and not has_label.all():
        raise UserError(
            "an answer without a label is compared with the mean of its prompt's answers, which belong to other units: "
            "a private run needs labels or --threshold"
        )


def label(path: Path, answers: Buffer, objective: Objective, threshold: float | None, max_length: int) -> Buffer:
    """A buffer of labeled answers, each followed by a mismatched answer if the objective couples examples.

    Args:
        path: directory of the buffer; created in one atomic append if missing.
        answers: the answers with their labels or rewards.
        objective: the objective that reads the labels.
        threshold: return above which an answer without a label is desirable; None for the mean of its prompt's
            answers.
        max_length: maximum number of tokens of a sequence.

    Raises:
        UserError: no answer can be labeled, see `replay.labels`.
    """
    buffer = open_or_create(path)
    if len(buffer):
        return buffer
    mismatched = objective.couple is not None
    added = buffer.append(labeled_records(answers, threshold, mismatched=mismatched, max_length=max_length))
    examples, desirable = added // 2 if mismatched else added, buffer.column("label").count(True)
    ties = f"; skipped {len(answers) - examples} ties" if examples < len(answers) else ""
    print(f"{desirable} answers are desirable, {examples - desirable} undesirable{ties}", file=sys.stderr)
    return buffer
