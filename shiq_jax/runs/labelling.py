"""The second buffer of losses on good and bad answers: labels out of rewards, and answers to other prompts."""

from __future__ import annotations

import sys
from pathlib import Path

from shiq_jax.data import formats
from shiq_jax.errors import Refusal
from shiq_jax.objectives import Objective
from shiq_jax.replay import Buffer, is_buffer
from shiq_jax.replay.labels import labelled
from shiq_jax.runs.ingest import open_or_create


def threshold_of(data: str | None, score: str | None, threshold: float | None) -> float | None:
    """The return above which an answer is good; None for the mean of its prompt's answers.

    Args:
        data: the rows that were read, or a replay buffer; None for samples. Their first row says whether they have
            labels, which stand in a buffer as rewards of 1 and 0.
        score: the field of their scores.
        threshold: what was asked for, which is for scores.

    Raises:
        Refusal: a threshold was asked for and the data have labels.
    """
    if data is None or is_buffer(data) or not formats.holds_labels(next(iter(formats.rows(data)), {}), score):
        return threshold
    if threshold is not None:
        raise Refusal(f"--threshold says which scores are good, but {data} has labels: leave it out")
    return 0.5


def label(path: Path, answers: Buffer, objective: Objective, threshold: float | None, longest: int) -> Buffer:
    """A buffer of labelled answers, each followed by a mismatched one where the objective couples through these.

    Args:
        path: of the buffer, made in one atomic append when it is not there.
        answers: the answers with their rewards.
        objective: reads labels.
        threshold: see `threshold_of`.
        longest: tokens of the longest sequence that can be learned from.

    Raises:
        Refusal: there is nothing to learn from, see `replay.labels`.
    """
    buffer = open_or_create(path)
    if len(buffer):
        return buffer
    mismatched = objective.couple is not None
    added = buffer.append(labelled(answers, threshold, mismatched=mismatched, longest=longest))
    examples, good = added // 2 if mismatched else added, int(buffer.returns().sum())
    tied = f"; {len(answers) - examples} tie and are left out" if examples < len(answers) else ""
    print(f"{good} answers are desirable, {examples - good} undesirable{tied}", file=sys.stderr)
    return buffer
