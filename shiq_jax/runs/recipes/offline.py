"""The offline run: one buffer, from data or sampled from the reference, and passes over it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from shiq_jax.objectives import Objective
from shiq_jax.replay import Buffer
from shiq_jax.runs.ingest import demonstrations, imported
from shiq_jax.runs.learning import passes
from shiq_jax.runs.options import Job
from shiq_jax.runs.phases import Plan
from shiq_jax.runs.private_run import private_plan
from shiq_jax.runs.round import LearningProblem, Round
from shiq_jax.runs.sampling import sample_answers
from shiq_jax.training.reference import Reference


@dataclasses.dataclass(frozen=True)
class Offline:
    """One round: learn from data, demonstrations, or the reference's own scored answers."""

    job: Job
    rounds: int = 1

    def collect(self, round: Round) -> Buffer:
        """Given data, the task's demonstrations, or answers of the reference with their rewards."""
        if self.job.data:
            return imported(round.run, round.directory.buffer, self.job.data, round.policy.model)
        if self.job.objective == "sft":
            return demonstrations(round.run, round.directory.buffer, round.policy.model)
        return sample_answers(round)

    def objective(self, round: Round) -> Objective:
        """The loss that the options name."""
        return self.job.loss.configured()

    def references(self, round: Round) -> Mapping[str, Reference]:
        """The policy that the run starts from."""
        return {"reference": round.reference}

    def plan(self, round: Round, problem: LearningProblem) -> Plan:
        """Passes over the buffer, or the phases of a private run."""
        return private_plan(round, problem) if self.job.privacy.on else passes(round, problem)
