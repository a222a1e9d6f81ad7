"""Evaluation of a model directory, or of a checkpoint of a run, outside of any run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from shiq_jax.data import formats
from shiq_jax.data.chat import load_tokenizer, stop_tokens
from shiq_jax.errors import Refusal
from shiq_jax.models import load_hf, locate
from shiq_jax.rollout import rewards
from shiq_jax.training.checkpoints import Checkpoints
from shiq_jax.training.evaluation import Evaluator
from shiq_jax.training.placement import mesh_of
from shiq_jax.training.run_directory import RunDirectory, write_json, write_jsonl


def evaluate(options) -> dict[str, Any]:
    """Numbers of a policy on prompts, written to `evaluation.json` with the samples beside it in `samples.jsonl`.

    Args:
        options: as eval.py declares them.

    Raises:
        Refusal: something named cannot be found or used, or the output directory holds another evaluation.
    """
    out = Path(options.output_dir or "runs/eval")
    if (out / "evaluation.json").exists():
        if options.resume:
            return json.loads((out / "evaluation.json").read_text())
        raise Refusal(f"{out} holds an evaluation already: add --resume to see it, or name another --output-dir")
    source, run, step = find_policy(options.model)
    mesh = mesh_of(options.mesh)
    dtype = jnp.dtype(options.compute)
    model, params = load_hf(source, mesh=mesh, compute_dtype=dtype)
    if run is not None:
        params = Checkpoints(run.checkpoints).restore_params(params, step)
    tokenizer = load_tokenizer(source)
    rows = formats.prompts(options.data)[: options.prompts]
    reward = rewards.resolve(options.reward) if options.reward else None
    evaluator = Evaluator(
        model, tokenizer, stop_tokens(tokenizer, locate(source)), rows, reward, options.max_tokens,
        options.samples_per_prompt, options.prompts_per_batch, options.greedy,
    )
    reference = options.reference or (source if run is not None else None)
    origin = load_hf(reference, mesh=mesh, compute_dtype=dtype)[1] if reference else None
    numbers, samples = evaluator(params, origin, jax.random.key(options.seed))
    if reference is None:
        numbers = {name: value for name, value in numbers.items() if not name.startswith("kl")}
    numbers = {"model": options.model, "reference": reference and str(reference), "data": options.data, "prompts": len(rows)} | numbers
    out.mkdir(parents=True, exist_ok=True)
    write_jsonl(out / "samples.jsonl", samples)
    write_json(out / "evaluation.json", numbers)
    return numbers


def find_policy(name: str) -> tuple[str | Path, RunDirectory | None, int | None]:
    """Where the weights' shapes come from, and the run and step when `name` is a run, its checkpoints or one of them.

    Raises:
        Refusal: a run's directory without a policy in it.
    """
    path = Path(name)
    candidates = [(path, None), (path.parent, None), (path.parent.parent, path.name)]
    for directory, step in candidates[: 1 + 2 * ("checkpoints" in path.parts)]:
        run = RunDirectory(directory)
        if run.checkpoints.is_dir() and run.config.exists():
            source = run.reference if run.reference.exists() else json.loads(run.config.read_text())["model"] or run.model
            return source, run, int(step) if step and step.isdigit() else None
    return name, None, None
