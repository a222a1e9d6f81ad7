"""Rounds of a run: policy -> samples or data -> scores -> buffer -> reference statistics -> updates -> policy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from shiq_jax import stopping
from shiq_jax.objectives import Objective
from shiq_jax.replay import Buffer
from shiq_jax.runs.export import export
from shiq_jax.runs.learning import execute_plan
from shiq_jax.runs.phases import Plan
from shiq_jax.runs.round import LearningProblem, Round, annotate, training_buffer
from shiq_jax.runs.run import RngStream, Run
from shiq_jax.runs.run_directory import read_json, write_json
from shiq_jax.training.reference import Reference
from shiq_jax.training.state import partition
from shiq_jax.training.trainable import add_adapters_and_heads, trainable_filter


class Recipe(Protocol):
    """An outer-loop algorithm.

    Attributes:
        rounds: number of rounds.
    """

    rounds: int

    def collect(self, round: Round) -> Buffer:
        """Fill the round's buffer with records and rewards, or resume filling it, and return it."""

    def objective(self, round: Round) -> Objective:
        """The loss of the round."""

    def references(self, round: Round) -> Mapping[str, Reference]:
        """The reference models, by name in `Example.references`; called only if the objective reads references."""

    def plan(self, round: Round, problem: LearningProblem) -> Plan:
        """The training plan of the round."""


def run_rounds(run: Run, recipe: Recipe, reference: Reference) -> list[dict[str, Any]]:
    """Run all incomplete rounds of a recipe; the last policy is exported to the run's `export/`.

    A round is complete once its `round.json` and its policy exist. The policy may be deleted after the next round is
    complete. Each round starts from the exported policy of the previous round.

    Args:
        run: state shared by all rounds.
        recipe: the outer-loop algorithm.
        reference: the policy before the first round.

    Returns:
        the `round.json` of every round: `records`, `buffer_bytes`, `probe` and `updates`.
    """
    policy, summaries = reference, []
    for number in range(recipe.rounds):
        directory = run.directory.round(number, recipe.rounds)
        step_offset = sum(summary["updates"] for summary in summaries)
        round = Round(run, number, directory, policy, reference, step_offset)
        following = run.directory.round(number + 1, recipe.rounds) if number + 1 < recipe.rounds else None
        next_complete = following is not None and following.round_summary.exists()
        if not (directory.round_summary.exists() and (directory.policy.exists() or next_complete)):
            _run_round(round, recipe)
        summaries.append(read_json(directory.round_summary))
        policy = Reference(directory.policy, run.load)
    return summaries


def _run_round(round: Round, recipe: Recipe) -> None:
    run, directory = round.run, round.directory
    stopping.check("before collecting data")
    answers = recipe.collect(round)
    objective = recipe.objective(round)
    buffer = training_buffer(round, answers, objective)
    references = recipe.references(round) if "references" in objective.needs else {}
    statistics, probes = annotate(run, buffer, references)
    stopping.check("before the updates")
    model, params = _trainable_model(round, objective)
    if round.policy is not round.reference or (model.lora is not None and recipe.rounds == 1):
        # Free the host copy: evaluations read the run's reference, or the base weights under the adapters.
        round.policy.close()
    trainable = partition(params, trainable_filter(model, objective))[0]
    problem = LearningProblem(model, trainable, objective, buffer, statistics)
    plan = recipe.plan(round, problem)
    state = execute_plan(round, problem, params, plan)
    stopping.check("before the export")
    export(run, model, state.params(), directory.policy)
    summary = {
        "records": len(answers),
        "buffer_bytes": answers.bytes,
        "probe": next(iter(probes.values()), None),
        "updates": int(state.step),
    }
    write_json(directory.round_summary, summary)


def _trainable_model(round: Round, objective: Objective):
    """Model and parameters of the round's policy with the adapters and heads that are trained."""
    job = round.run.job
    keys = tuple(round.run.key(stream, round.number) for stream in (RngStream.ADAPTERS, RngStream.HEADS))
    return add_adapters_and_heads(*round.policy.open(), objective, lora=job.lora.build(), keys=keys)
