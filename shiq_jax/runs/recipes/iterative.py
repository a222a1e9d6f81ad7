"""Iterative training: repeat sampling from the policy, scoring and training.

With `dpo` this is iterative DPO: each round trains on the best and the worst of the policy's own answers to each
prompt. Sources: Xu et al., "Some things are more CRINGE than others" (arXiv 2312.16682); Dong et al., "RLHF Workflow:
From Reward Modeling to Online RLHF" (arXiv 2405.07863).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from shiq_jax.objectives import Objective
from shiq_jax.replay import Buffer
from shiq_jax.runs.learning import training_plan
from shiq_jax.runs.options import Job
from shiq_jax.runs.phases import Plan
from shiq_jax.runs.round import LearningProblem, Round
from shiq_jax.runs.sampling import sample_answers
from shiq_jax.training.reference import Reference


@dataclasses.dataclass(frozen=True)
class Iterative:
    """Sampling and training in `--rounds` rounds, each starting from the policy of the previous round."""

    job: Job

    @property
    def rounds(self) -> int:
        """The number of rounds."""
        return self.job.rounds

    def collect(self, round: Round) -> Buffer:
        """Answers of the round's policy to the run's prompts, scored by the run's reward."""
        return sample_answers(round)

    def objective(self, round: Round) -> Objective:
        """The loss selected by the options."""
        return self.job.loss.build()

    def references(self, round: Round) -> Mapping[str, Reference]:
        """The policy before the first round, or the policy that this round samples from."""
        previous = self.job.round.reference == "previous"
        return {"reference": round.policy if previous else round.reference}

    def plan(self, round: Round, problem: LearningProblem) -> Plan:
        """Passes over the round's buffer."""
        return training_plan(round, problem)
