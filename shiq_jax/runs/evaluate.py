"""Evaluation of a model directory, or of a checkpoint of a run, outside of any run."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from shiq_jax import progress
from shiq_jax.data import formats
from shiq_jax.data.answers import prompt_row
from shiq_jax.data.chat import load_tokenizer, stop_tokens
from shiq_jax.data.kinds import classify
from shiq_jax.errors import UserError, disk_errors
from shiq_jax.models import ModelWithHeads, load_hf, locate
from shiq_jax.objectives import OBJECTIVES, Objective
from shiq_jax.replay import Buffer
from shiq_jax.runs import report
from shiq_jax.runs.ingest import READERS, import_records
from shiq_jax.runs.labelling import label
from shiq_jax.runs.loss_options import recorded
from shiq_jax.runs.options import Adapters
from shiq_jax.runs.policies import find_policy
from shiq_jax.runs.run_directory import RunDirectory, read_json, write_json, write_jsonl
from shiq_jax.runs.sources import prompts_of
from shiq_jax.sharding import hosts
from shiq_jax.tasks import rewards
from shiq_jax.training.checkpoints import Checkpoints
from shiq_jax.training.evaluation import Evaluator
from shiq_jax.training.objective_metrics import objective_metrics
from shiq_jax.training.placement import mesh_from_flag
from shiq_jax.training.reference import Reference
from shiq_jax.training.trainable import add_adapters_and_heads


@progress.display()
@disk_errors()
def evaluate(options) -> dict[str, Any]:
    """Numbers of a policy on held-out rows: `evaluation.json`, `evaluation.png`, and the samples in `samples.jsonl`.

    Args:
        options: as eval.py declares them.

    Raises:
        UserError: something named cannot be found or used, or the output directory holds another evaluation.
    """
    out = RunDirectory.begin(Path(options.output_dir or "runs/eval"), options.settings(), resume=options.resume)
    result = out.path / "evaluation.json"
    if result.exists():
        numbers = read_json(result)
    else:
        with out.locked():
            numbers = _written(options, out, result)
    report.print_table(f"{options.model} on {options.data}", list(_flat(numbers).items()))
    return numbers


def _written(options, out: RunDirectory, result: Path) -> dict[str, Any]:
    try:
        with disk_errors(out.path):
            numbers, samples = _measure(options, out)
    except UserError:
        if not options.resume:
            out.discard(samples=False)
        raise
    write_jsonl(out.path / "samples.jsonl", samples)
    report.draw_evaluation(samples, out.path / "evaluation.png", options.model)
    write_json(result, numbers)
    return numbers


def _learner(model, params, settings: Mapping[str, Any]):
    """The model with the adapters and heads of a run, for those of its checkpoints to come to."""
    objective = recorded(settings["loss"])
    lora, key = Adapters(**settings.get("lora", {})).configured(), jax.random.key(0)
    return add_adapters_and_heads(model, params, objective, lora=lora, keys=(key, key))


def _measure(options, out: RunDirectory) -> tuple[dict[str, Any], list[dict]]:
    mesh = mesh_from_flag(options.mesh)

    def load(name):
        return load_hf(name, mesh=mesh, compute_dtype=jnp.dtype(options.compute))

    policy = find_policy(options.model)
    source, run = policy.base, policy.run
    model, params = load(source)
    model, params = ModelWithHeads.load(model, params, locate(source))
    if run is not None:
        model, params = _learner(model, params, read_json(run.config))
        with contextlib.closing(Checkpoints(policy.checkpoints, read_only=True)) as checkpoints:
            params = checkpoints.restore_params(params, policy.step)
    tokenizer = load_tokenizer(source, model.config.vocab_size)
    origin = options.reference or (run.start_of(run.begun_rounds()[0]) if run is not None else None)
    reference = Reference(origin, load, model.config.vocab_size) if origin else None

    rows = _rows(options)
    reward = rewards.resolve(options.reward) if options.reward else None
    learned_by = classify(rows[0], options.score).objectives
    name = options.objective or next(iter(learned_by), None)
    examples = None
    if name in learned_by:
        file = out.path / "rows.jsonl"
        write_jsonl(file, rows)
        hosts.on_writer(shutil.rmtree)(out.buffer, ignore_errors=True)
        examples = import_records(
            out.buffer, lambda reading: READERS[name](file, tokenizer, reading), model,
            score=options.score, reward=reward,
        )  # fmt: skip
        rows = prompts_of(examples, options.prompts, model.config.max_positions - options.max_tokens)
    elif options.score is not None:
        raise UserError(f"--score {options.score} names scores of answers, but {options.data} holds none: leave it out")
    else:
        rows = [prompt_row(row) for row in rows]
    evaluator = Evaluator(
        model, tokenizer, stop_tokens(tokenizer, locate(source)), rows, reward, options.max_tokens,
        options.samples_per_prompt, options.prompts_in_flight, options.greedy,
    )  # fmt: skip
    found = evaluator(params, reference, jax.random.key(options.seed))
    numbers = found.metrics
    if reference is None:
        numbers = {key: value for key, value in numbers.items() if not key.startswith("kl")}
    if examples is None and reward is not None:
        hosts.on_writer(shutil.rmtree)(out.path / "fresh", ignore_errors=True)
        examples = Buffer.create(out.path / "fresh")
        examples.append(found.records)
    numbers |= {"model": options.model, "reference": origin and str(origin), "data": options.data, "rows": len(rows)}
    if examples is not None and "labels" in OBJECTIVES[name or "shiq"].needs:
        examples = _labelled(OBJECTIVES[name], model, examples, out)
    objective, metrics = _objective_metrics(name or "shiq", options, model, params, examples, reference)
    return (
        numbers | {"objective": objective, "objective_metrics": metrics, "machine": report.machine()},
        evaluator.generations(found),
    )


def _labelled(objective: Objective, model, examples: Buffer, out: RunDirectory) -> Buffer:
    """The examples as good and bad answers: by their labels, or by the mean of a prompt's answers."""
    hosts.on_writer(shutil.rmtree)(out.labelled, ignore_errors=True)
    return label(out.labelled, examples, objective, None, model.config.max_positions)


def _objective_metrics(name: str, options, model, params, examples: Buffer | None, reference: Reference | None):
    """The objective's metrics on the examples, where there are any and what it needs is there."""
    objective = OBJECTIVES[name]
    if examples is None or ("references" in objective.needs and reference is None):
        return None, None
    references = {}
    if "references" in objective.needs:
        objective = objective.configure(beta=options.beta)
        identity, _ = reference.annotate(examples, prompts_per_batch=options.prompts_in_flight)
        references = {"reference": examples.statistics(identity)}
    return name, objective_metrics(
        model, params, objective, examples, references, prompts_per_batch=options.prompts_in_flight
    )


def _rows(options) -> list[dict]:
    rows = []
    for row in formats.rows(options.data):
        rows.append(row)
        if len(rows) == options.prompts:
            break
    if not rows:
        raise UserError(f"{options.data} holds no rows: give at least one with a prompt")
    return rows


def _flat(numbers: Mapping[str, Any]) -> dict[str, Any]:
    nested = numbers.get("objective_metrics") or {}
    shown = {key: value for key, value in numbers.items() if not isinstance(value, dict | None)}
    return shown | {f"{numbers['objective']}: {key}": value for key, value in nested.items()}
