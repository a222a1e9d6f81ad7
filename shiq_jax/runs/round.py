"""One round of a run: its directory, its initial policy and its learning problem."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

from shiq_jax.objectives import Objective
from shiq_jax.replay import Buffer, References
from shiq_jax.runs.labeling import check_threshold, label
from shiq_jax.runs.run import Run
from shiq_jax.runs.run_directory import RoundDirectory
from shiq_jax.training.reference import Reference


class Round(NamedTuple):
    """One round of a run.

    Attributes:
        run: state shared by all rounds.
        number: index of the round, from 0.
        directory: paths of the round's files.
        policy: policy that the round samples from and starts training from.
        reference: policy before the first round; evaluations measure the KL to it.
        step_offset: updates of earlier rounds.
    """

    run: Run
    number: int
    directory: RoundDirectory
    policy: Reference
    reference: Reference
    step_offset: int

    @property
    def tags(self) -> dict[str, int]:
        """Additional fields of the round's log lines: its number, if there are several rounds."""
        return {"round": self.number} if self.directory is not self.run.directory else {}


class LearningProblem(NamedTuple):
    """Model, objective and data of a round.

    Attributes:
        model: the model with its adapters and heads.
        trainable: the trainable parameters.
        objective: the loss.
        buffer: the records.
        references: reference name -> token statistics for `Example.references`.
    """

    model: Any
    trainable: Any
    objective: Objective
    buffer: Buffer
    references: References


def training_buffer(round: Round, answers: Buffer, objective: Objective) -> Buffer:
    """The answers, or for an objective that reads labels a second buffer of labeled answers.

    Raises:
        UserError: see `check_threshold`.
    """
    if "labels" not in objective.needs:
        return answers
    job, context = round.run.job, round.policy.model.config.max_positions
    check_threshold(answers, job.threshold, job.data, private=job.privacy.enabled)
    max_length = min(context, job.drop_longer_than or context)
    return label(round.directory.labeled, answers, objective, job.threshold, max_length)


def annotate(
    run: Run, buffer: Buffer, references: Mapping[str, Reference]
) -> tuple[dict[str, Any], dict[str, dict | None]]:
    """Token statistics of a buffer under each reference, and the results of the step-zero probes."""
    statistics, probes = {}, {}
    for name, reference in references.items():
        options = {"prompts_per_batch": run.job.batch_size, "row_length": run.job.row_length}
        identity, probes[name] = reference.annotate(buffer, **options)
        print(f"step-zero probe of the sampler's statistics: {probes[name] or 'no statistics'}", file=sys.stderr)
        statistics[name] = buffer.statistics(identity)
    return statistics, probes
