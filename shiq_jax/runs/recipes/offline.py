"""Offline training: a fixed buffer, imported or sampled from the reference, and passes over it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from shiq_jax.objectives import Objective
from shiq_jax.replay import Buffer
from shiq_jax.runs.ingest import import_data, import_demonstrations
from shiq_jax.runs.learning import training_plan
from shiq_jax.runs.options import Job
from shiq_jax.runs.phases import Plan
from shiq_jax.runs.private_run import private_plan
from shiq_jax.runs.round import LearningProblem, Round
from shiq_jax.runs.sampling import sample_answers
from shiq_jax.training.reference import Reference


@dataclasses.dataclass(frozen=True)
class Offline:
    """One round of training on external data, demonstrations, or the reference's own scored answers."""

    job: Job
    rounds: int = 1

    def collect(self, round: Round) -> Buffer:
        """External data, the task's demonstrations, or scored answers of the reference."""
        if self.job.data:
            return import_data(round.run, round.directory.buffer, self.job.data, round.policy.model)
        if self.job.objective == "sft":
            return import_demonstrations(round.run, round.directory.buffer, round.policy.model)
        return sample_answers(round)

    def objective(self, round: Round) -> Objective:
        """The loss selected by the options."""
        return self.job.loss.build()

    def references(self, round: Round) -> Mapping[str, Reference]:
        """The policy that the run starts from."""
        return {"reference": round.reference}

    def plan(self, round: Round, problem: LearningProblem) -> Plan:
        """Passes over the buffer, or the phases of a private run."""
        return private_plan(round, problem) if self.job.privacy.enabled else training_plan(round, problem)
