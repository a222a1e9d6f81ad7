"""Rounds of a run: policy -> data -> scores -> buffer -> statistics of the references -> phases -> policy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from shiq_jax import stopping
from shiq_jax.objectives import Objective
from shiq_jax.replay import Buffer
from shiq_jax.runs.export import export
from shiq_jax.runs.learning import learn
from shiq_jax.runs.phases import Plan
from shiq_jax.runs.round import LearningProblem, Round, annotated, labelled
from shiq_jax.runs.run import RngStream, Run
from shiq_jax.runs.run_directory import read_json, write_json
from shiq_jax.training.reference import Reference
from shiq_jax.training.state import partition
from shiq_jax.training.trainable import add_adapters_and_heads, trainable_filter


class Recipe(Protocol):
    """An outer-loop algorithm.

    Attributes:
        rounds: how many rounds there are.
    """

    rounds: int

    def collect(self, round: Round) -> Buffer:
        """The records that the round learns from, with their rewards, complete on disk; resumes what is there."""

    def objective(self, round: Round) -> Objective:
        """The loss of the round."""

    def references(self, round: Round) -> Mapping[str, Reference]:
        """The models that annotate the records, by name in `Example.references`; called if the objective reads them."""

    def plan(self, round: Round, problem: LearningProblem) -> Plan:
        """The phases of updates."""


def run_rounds(run: Run, recipe: Recipe, reference: Reference) -> list[dict[str, Any]]:
    """Run the rounds of a recipe that are not complete; the last policy is then in the run's `export/`.

    A round is complete that has its `round.json` and its policy, which may be missing once the next round is complete.
    Each round starts from the policy that the one before exported.

    Args:
        run: what all rounds share.
        recipe: what they do.
        reference: the policy before the first round.

    Returns:
        the `round.json` of every round: `records`, `buffer_bytes`, `probe` and `updates`.
    """
    policy, done = reference, []
    for number in range(recipe.rounds):
        directory = run.directory.round(number, recipe.rounds)
        before = sum(each["updates"] for each in done)
        round = Round(run, number, directory, policy, reference, before)
        following = run.directory.round(number + 1, recipe.rounds) if number + 1 < recipe.rounds else None
        used = following is not None and following.done.exists()
        if not (directory.done.exists() and (directory.policy.exists() or used)):
            _run_round(round, recipe)
        done.append(read_json(directory.done))
        policy = Reference(directory.policy, run.load)
    return done


def _run_round(round: Round, recipe: Recipe) -> None:
    run, directory = round.run, round.directory
    stopping.check("before the buffer")
    answers = recipe.collect(round)
    objective = recipe.objective(round)
    buffer = labelled(round, answers, objective)
    references = recipe.references(round) if "references" in objective.needs else {}
    statistics, probes = annotated(run, buffer, references)
    stopping.check("before the updates")
    model, params = _learner(round, objective)
    if round.policy is not round.reference or (model.lora is not None and recipe.rounds == 1):
        # No evaluation opens it again: its weights are now trained, or are the base of the adapters.
        round.policy.close()
    trainable = partition(params, trainable_filter(model, objective))[0]
    problem = LearningProblem(model, trainable, objective, buffer, statistics)
    plan = recipe.plan(round, problem)
    state = learn(round, problem, params, plan)
    stopping.check("before the export")
    export(run, model, state.params(), directory.policy)
    found = {
        "records": len(answers),
        "buffer_bytes": answers.bytes,
        "probe": next(iter(probes.values()), None),
        "updates": int(state.step),
    }
    write_json(directory.done, found)


def _learner(round: Round, objective: Objective):
    """The round's policy with the adapters and heads that learn."""
    job, keys = round.run.job, [round.run.key(use, round.number) for use in (RngStream.ADAPTERS, RngStream.HEADS)]
    return add_adapters_and_heads(*round.policy.open(), objective, lora=job.lora.configured(), keys=tuple(keys))
