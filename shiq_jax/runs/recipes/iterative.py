"""Iterative learning: sample from the policy, score, learn, again.

With `dpo` this is iterative DPO: each round learns from the best and the worst of the policy's own answers to each
prompt. Sources: Xu et al., "Some things are more CRINGE than others" (arXiv 2312.16682); Dong et al., "RLHF Workflow:
From Reward Modeling to Online RLHF" (arXiv 2405.07863).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from shiq_jax.objectives import Objective
from shiq_jax.replay import Buffer
from shiq_jax.runs.learning import passes
from shiq_jax.runs.options import Job
from shiq_jax.runs.phases import Plan
from shiq_jax.runs.round import LearningProblem, Round
from shiq_jax.runs.sampling import sample_answers
from shiq_jax.training.reference import Reference


@dataclasses.dataclass(frozen=True)
class Iterative:
    """`--rounds` rounds; each starts from the policy that the one before has learned."""

    job: Job

    @property
    def rounds(self) -> int:
        """How many rounds there are."""
        return self.job.rounds

    def collect(self, round: Round) -> Buffer:
        """Answers of the round's policy to the run's prompts, scored by the run's reward."""
        return sample_answers(round)

    def objective(self, round: Round) -> Objective:
        """The loss that the options name."""
        return self.job.loss.configured()

    def references(self, round: Round) -> Mapping[str, Reference]:
        """The policy before the first round, or the one that this round samples from."""
        previous = self.job.round.reference == "previous"
        return {"reference": round.policy if previous else round.reference}

    def plan(self, round: Round, problem: LearningProblem) -> Plan:
        """Passes over the round's buffer."""
        return passes(round, problem)
