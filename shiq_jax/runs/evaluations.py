"""Evaluations of a policy during a run: fresh samples, their rewards, and their distance from the reference."""

from __future__ import annotations

import math

import jax

from shiq_jax.runs.callbacks import EvaluatePolicy
from shiq_jax.runs.phases import Plan
from shiq_jax.runs.round import LearningProblem, Round
from shiq_jax.runs.run import RngStream
from shiq_jax.runs.run_directory import write_jsonl
from shiq_jax.runs.sources import prompts_of
from shiq_jax.sharding import hosts
from shiq_jax.training.evaluation import LOGGED_PROMPTS, LOGGED_SAMPLES, Evaluator
from shiq_jax.training.reference import Reference

STAGES = ("evaluation", "samples")


class Evaluations:
    """Evaluates the policies of a round, logs the numbers and keeps some of the generations.

    Args:
        round: whose policies.
        problem: its model, and the buffer whose prompts serve where no others are given.
    """

    def __init__(self, round: Round, problem: LearningProblem):
        run, options, model = round.run, round.run.job.evaluation, problem.model
        rows = run.task.held_out
        if rows is None:
            rows = prompts_of(problem.buffer, options.prompts, model.config.max_positions - options.max_tokens)
        self._round, self._model = round, model
        self._evaluator = Evaluator(
            model, run.tokenizer, run.stops, rows, run.task.reward, options.max_tokens,
            options.samples_per_prompt, options.prompts_in_flight, options.greedy,
        )  # fmt: skip

    def __call__(
        self, weights, step: int, passes: float = 0.0, stage: str = "evaluation", prompts: int | None = None
    ) -> dict[str, float]:
        """Measure a policy after so many updates of the round, log what is found, and return the numbers."""
        run, at = self._round.run, self._round.before + step
        key = jax.random.fold_in(run.key(RngStream.EVALUATION), at)
        found = self._evaluator(weights, self._reference(weights) if at else None, key, prompts)
        # An evaluation that was logged, but not saved with the policy, is made again.
        run.log.rewind([stage], at - 1)
        where = {"step": at, "pass": round(passes, 3)} | self._round.tags
        from_itself = {} if at else {"logratio": 0.0}
        shown = self._evaluator.generations(found, LOGGED_PROMPTS, LOGGED_SAMPLES)
        hosts.on_writer(run.directory.samples.mkdir)(exist_ok=True)
        write_jsonl(run.directory.generations(at), [where | row | from_itself for row in shown])
        run.log.write(stage, at, **found.metrics, **self._round.tags)
        return found.metrics

    def callback(self, plan: Plan) -> EvaluatePolicy:
        """The callback that evaluates at the marks which the run's options ask for."""
        times = self._round.run.job.evaluation.times
        return EvaluatePolicy(
            lambda state, step, passes: self(state.params(), step, passes),
            lambda state, step, passes: self(state.params(), step, passes, "samples", LOGGED_PROMPTS),
            every=math.ceil(plan.steps / times) if times else None,
            before=plan.on_evaluation,
        )

    def _reference(self, weights) -> Reference:
        """The run's reference; where it is the base of the policy's adapters, that base."""
        if self._model.lora is None or self._round.policy is not self._round.reference:
            return self._round.reference
        return Reference(self._round.reference.source, lambda _: self._model.switched_off(weights), cache=False)
