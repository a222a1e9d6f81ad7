"""Evaluation of a policy during a run: fresh samples, their rewards, and the KL to the reference."""

from __future__ import annotations

import math

import jax

from shiq_jax.runs.callbacks import EvaluatePolicy
from shiq_jax.runs.phases import Plan
from shiq_jax.runs.round import LearningProblem, Round
from shiq_jax.runs.run import RngStream
from shiq_jax.runs.run_directory import write_jsonl
from shiq_jax.runs.sources import prompts_from_buffer
from shiq_jax.sharding import hosts
from shiq_jax.training.evaluation import LOGGED_PROMPTS, LOGGED_SAMPLES, Evaluator
from shiq_jax.training.reference import Reference

STAGES = ("evaluation", "samples")


class Evaluations:
    """Evaluate the policies of a round, log the metrics and store some generations.

    Args:
        round: the round.
        problem: its model, and the buffer that provides the prompts if the task has no held-out prompts.
    """

    def __init__(self, round: Round, problem: LearningProblem):
        run, options, model = round.run, round.run.job.evaluation, problem.model
        rows = run.task.held_out
        if rows is None:
            rows = prompts_from_buffer(problem.buffer, options.prompts, model.config.max_positions - options.max_tokens)
        self._round, self._model = round, model
        self._evaluator = Evaluator(
            model, run.tokenizer, run.stop_tokens, rows, run.task.reward, options.max_tokens,
            options.samples_per_prompt, options.prompts_in_flight, options.greedy,
        )  # fmt: skip

    def __call__(
        self, params, step: int, epoch: float = 0.0, stage: str = "evaluation", prompts: int | None = None
    ) -> dict[str, float]:
        """Evaluate the policy after `step` updates of the round, log the metrics and return them.

        Args:
            params: parameters of the policy.
            step: updates of the round so far.
            epoch: passes over the round's buffer so far.
            stage: stage of the log line.
            prompts: number of prompts; None for all.
        """
        run, total_steps = self._round.run, self._round.step_offset + step
        key = jax.random.fold_in(run.key(RngStream.EVALUATION), total_steps)
        result = self._evaluator(params, self._reference(params) if total_steps else None, key, prompts)
        # A run killed before the checkpoint of this step has already logged this evaluation.
        run.log.rewind([stage], total_steps - 1)
        fields = {"step": total_steps, "pass": round(epoch, 3)} | self._round.tags
        initial_logratio = {} if total_steps else {"logratio": 0.0}
        shown = self._evaluator.generations(result, LOGGED_PROMPTS, LOGGED_SAMPLES)
        hosts.on_writer(run.directory.samples.mkdir)(exist_ok=True)
        write_jsonl(run.directory.generations(total_steps), [fields | row | initial_logratio for row in shown])
        run.log.write(stage, total_steps, **result.metrics, **self._round.tags)
        return result.metrics

    def callback(self, plan: Plan) -> EvaluatePolicy:
        """The `fit` callback that evaluates `evaluation.times` times per round."""
        times = self._round.run.job.evaluation.times
        return EvaluatePolicy(
            lambda state, step, epoch: self(state.params(), step, epoch),
            lambda state, step, epoch: self(state.params(), step, epoch, "samples", LOGGED_PROMPTS),
            every=math.ceil(plan.steps / times) if times else None,
            before=plan.on_evaluation,
        )

    def _reference(self, params) -> Reference:
        """The run's reference; for LoRA on top of the reference, the policy without its adapters."""
        if self._model.lora is None or self._round.policy is not self._round.reference:
            return self._round.reference
        return Reference(self._round.reference.source, lambda _: self._model.without_adapters(params), cache=False)
