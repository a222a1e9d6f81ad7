"""One round of a run: its directory, what it starts from, and the problem that it learns."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

from shiq_jax.objectives import Objective
from shiq_jax.replay import Buffer, References
from shiq_jax.runs.labelling import check_threshold, label
from shiq_jax.runs.run import Run
from shiq_jax.runs.run_directory import RoundDirectory
from shiq_jax.training.reference import Reference


class Round(NamedTuple):
    """One round of a run.

    Attributes:
        run: what all rounds share.
        number: from 0.
        directory: where its files go.
        policy: what it samples from and starts to learn from.
        reference: the policy before the first round, to which evaluations measure the KL.
        before: updates of earlier rounds.
    """

    run: Run
    number: int
    directory: RoundDirectory
    policy: Reference
    reference: Reference
    before: int

    @property
    def tags(self) -> dict[str, int]:
        """Additional fields of this round's lines in the log: its number, if there are several rounds."""
        return {"round": self.number} if self.directory is not self.run.directory else {}


class LearningProblem(NamedTuple):
    """What a round learns and the data that it learns from.

    Attributes:
        model: with its adapters and heads.
        trainable: the parameters that learn.
        objective: the loss.
        buffer: the records.
        references: by name, the statistics that fill `Example.references`.
    """

    model: Any
    trainable: Any
    objective: Objective
    buffer: Buffer
    references: References


def labelled(round: Round, answers: Buffer, objective: Objective) -> Buffer:
    """The answers, or for an objective that reads labels a second buffer of good and bad answers.

    Raises:
        UserError: see `check_threshold`.
    """
    if "labels" not in objective.needs:
        return answers
    job, context = round.run.job, round.policy.model.config.max_positions
    check_threshold(answers, job.threshold, job.data, private=job.privacy.on)
    longest = min(context, job.drop_longer_than or context)
    return label(round.directory.labelled, answers, objective, job.threshold, longest)


def annotated(
    run: Run, buffer: Buffer, references: Mapping[str, Reference]
) -> tuple[dict[str, Any], dict[str, dict | None]]:
    """The statistics of a buffer under each reference, and what the probe of the sampler's own statistics found."""
    statistics, probes = {}, {}
    for name, reference in references.items():
        options = {"prompts_per_batch": run.job.batch_size, "row_length": run.job.row_length}
        identity, probes[name] = reference.annotate(buffer, **options)
        print(f"step-zero probe of the sampler's statistics: {probes[name] or 'there are none'}", file=sys.stderr)
        statistics[name] = buffer.statistics(identity)
    return statistics, probes
