"""Standalone evaluation of a model directory or of a checkpoint of a run."""

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
from shiq_jax.data.answers import with_prompt
from shiq_jax.data.chat import load_tokenizer, stop_tokens
from shiq_jax.data.kinds import classify
from shiq_jax.errors import UserError, disk_errors
from shiq_jax.models import ModelWithHeads, load_hf, locate
from shiq_jax.objectives import OBJECTIVES, Objective
from shiq_jax.replay import Buffer
from shiq_jax.runs import report
from shiq_jax.runs.ingest import READERS, import_records
from shiq_jax.runs.labeling import label
from shiq_jax.runs.loss_options import objective_from_settings
from shiq_jax.runs.options import Adapters
from shiq_jax.runs.policies import resolve_policy
from shiq_jax.runs.run_directory import RunDirectory, read_json, write_json, write_jsonl
from shiq_jax.runs.sources import prompts_from_buffer
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
    """Evaluate a policy on held-out rows; write `evaluation.json`, `evaluation.png` and `samples.jsonl`.

    Args:
        options: see `eval_command.Evaluate`.

    Raises:
        UserError: an input is missing or invalid, or the output directory holds another evaluation.
    """
    out = RunDirectory.begin(Path(options.output_dir or "runs/eval"), options.settings(), resume=options.resume)
    result = out.path / "evaluation.json"
    if result.exists():
        metrics = read_json(result)
    else:
        with out.locked():
            metrics = _evaluate_and_write(options, out, result)
    report.print_table(f"{options.model} on {options.data}", list(_table_rows(metrics).items()))
    return metrics


def _evaluate_and_write(options, out: RunDirectory, result: Path) -> dict[str, Any]:
    try:
        with disk_errors(out.path):
            metrics, samples = _evaluate(options, out)
    except UserError:
        if not options.resume:
            out.discard(samples=False)
        raise
    write_jsonl(out.path / "samples.jsonl", samples)
    report.draw_evaluation(samples, out.path / "evaluation.png", options.model)
    write_json(result, metrics)
    return metrics


def _with_trainable_parts(model, params, settings: Mapping[str, Any]):
    """Add the adapters and heads of a run, so that its checkpoints can be restored into the parameters."""
    objective = objective_from_settings(settings["loss"])
    lora, key = Adapters(**settings.get("lora", {})).build(), jax.random.key(0)
    return add_adapters_and_heads(model, params, objective, lora=lora, keys=(key, key))


def _evaluate(options, out: RunDirectory) -> tuple[dict[str, Any], list[dict]]:
    """All metrics, and the rows of `samples.jsonl`."""
    mesh = mesh_from_flag(options.mesh)

    def load(name):
        return load_hf(name, mesh=mesh, compute_dtype=jnp.dtype(options.compute))

    policy = resolve_policy(options.model)
    source, run = policy.base, policy.run
    model, params = load(source)
    model, params = ModelWithHeads.load(model, params, locate(source))
    if run is not None:
        model, params = _with_trainable_parts(model, params, read_json(run.config))
        with contextlib.closing(Checkpoints(policy.checkpoints, read_only=True)) as checkpoints:
            params = checkpoints.restore_params(params, policy.step)
    tokenizer = load_tokenizer(source, model.config.vocab_size)
    reference_source = options.reference or (run and run.initial_policy(run.started_rounds()[0]))
    reference = Reference(reference_source, load, model.config.vocab_size) if reference_source else None

    rows = _rows(options)
    reward = rewards.resolve(options.reward) if options.reward else None
    compatible_objectives = classify(rows[0], options.score).objectives
    name = options.objective or next(iter(compatible_objectives), None)
    examples = None
    if name in compatible_objectives:
        file = out.path / "rows.jsonl"
        write_jsonl(file, rows)
        hosts.on_writer(shutil.rmtree)(out.buffer, ignore_errors=True)
        examples = import_records(
            out.buffer, lambda context: READERS[name](file, tokenizer, context), model,
            score=options.score, reward=reward,
        )  # fmt: skip
        rows = prompts_from_buffer(examples, options.prompts, model.config.max_positions - options.max_tokens)
    elif options.score is not None:
        raise UserError(
            f"--score {options.score} applies to scored answers, but {options.data} contains none: omit --score"
        )
    else:
        rows = [with_prompt(row) for row in rows]
    evaluator = Evaluator(
        model, tokenizer, stop_tokens(tokenizer, locate(source)), rows, reward, options.max_tokens,
        options.samples_per_prompt, options.prompts_in_flight, options.greedy,
    )  # fmt: skip
    result = evaluator(params, reference, jax.random.key(options.seed))
    metrics = result.metrics
    if reference is None:
        metrics = {key: value for key, value in metrics.items() if not key.startswith("kl")}
    if examples is None and reward is not None:
        hosts.on_writer(shutil.rmtree)(out.path / "fresh", ignore_errors=True)
        examples = Buffer.create(out.path / "fresh")
        examples.append(result.records)
    metrics |= {
        "model": options.model,
        "reference": reference_source and str(reference_source),
        "data": options.data,
        "rows": len(rows),
    }
    if examples is not None and "labels" in OBJECTIVES[name or "shiq"].needs:
        examples = _label(OBJECTIVES[name], model, examples, out)
    objective, loss_metrics = _objective_metrics(name or "shiq", options, model, params, examples, reference)
    metrics |= {"objective": objective, "objective_metrics": loss_metrics, "machine": report.machine()}
    return metrics, evaluator.generations(result)


def _label(objective: Objective, model, examples: Buffer, out: RunDirectory) -> Buffer:
    """A buffer of labeled answers: from the labels of the examples, or from the mean of a prompt's answers."""
    hosts.on_writer(shutil.rmtree)(out.labeled, ignore_errors=True)
    return label(out.labeled, examples, objective, None, model.config.max_positions)


def _objective_metrics(name: str, options, model, params, examples: Buffer | None, reference: Reference | None):
    """Name and metrics of the objective on the examples; (None, None) without examples or a required reference."""
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
    """The first `--prompts` rows of the data."""
    rows = []
    for row in formats.rows(options.data):
        rows.append(row)
        if len(rows) == options.prompts:
            break
    if not rows:
        raise UserError(f"{options.data} holds no rows: at least one row with a prompt is needed")
    return rows


def _table_rows(metrics: Mapping[str, Any]) -> dict[str, Any]:
    nested = metrics.get("objective_metrics") or {}
    rows = {key: value for key, value in metrics.items() if not isinstance(value, dict | None)}
    return rows | {f"{metrics['objective']}: {key}": value for key, value in nested.items()}
