"""A run from its options to its summary: warm start, sample, score, keep, annotate, passes, evaluate, export.

Every stage leaves a file or directory that says that it is done, and begins where that file says; so a run that stopped
anywhere goes on with the same calls.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from shiq_jax.data import formats
from shiq_jax.data.chat import load_tokenizer, stop_tokens
from shiq_jax.models import load_hf, locate, save_hf
from shiq_jax.objectives import OBJECTIVES, Objective
from shiq_jax.errors import Refusal
from shiq_jax.replay import Buffer, Record, estimate_bytes
from shiq_jax.rollout.collect import collect
from shiq_jax.rollout.generate import Sampler
from shiq_jax.training import report
from shiq_jax.training.annotation import annotate, reference_identity
from shiq_jax.training.baseline import GroupMeanBaseline
from shiq_jax.training.batches import Batches
from shiq_jax.training.checkpoints import Checkpoints
from shiq_jax.training.config import Job
from shiq_jax.training.evaluation import Evaluator
from shiq_jax.training.metrics import MetricsLog, track
from shiq_jax.training.optimizers import Optimizer
from shiq_jax.training.passes import Marks, run_passes, tokens_per_second
from shiq_jax.training.placement import mesh_of
from shiq_jax.training.run_directory import RunDirectory, write_json, write_jsonl
from shiq_jax.training.state import State, init_state
from shiq_jax.training.tasks import Task, prepare
from shiq_jax.training.update import make_update

# What the run's key is folded with, so that no two uses share random numbers.
_SAMPLING, _EVALUATION, _UPDATES, _WARM_START = range(4)
_SHOWN = 8


@dataclasses.dataclass(frozen=True)
class Run:
    """What all stages of a run share."""

    job: Job
    directory: RunDirectory
    task: Task
    mesh: jax.sharding.Mesh | None
    tokenizer: Any
    stops: tuple[int, ...]
    log: MetricsLog

    def key(self, use: int) -> jax.Array:
        """A random key of its own for each use."""
        return jax.random.fold_in(jax.random.key(self.job.seed), use)

    def load(self, source: str | Path):
        """Model and parameters of a directory or hub id, on this run's mesh and in its precision."""
        precision = self.job.precision
        return load_hf(source, mesh=self.mesh, compute_dtype=jnp.dtype(precision.compute), remat=precision.remat)


def train(job: Job) -> dict[str, Any]:
    """Run a job to its end, or go on with it, and return its summary.

    Raises:
        Refusal: some input cannot be used.
    """
    began = time.monotonic()
    directory = RunDirectory.begin(job.directory(), job.settings(), resume=job.resume)
    if directory.summary.exists():
        summary = json.loads(directory.summary.read_text())
        report.print_table(f"{directory.path} is complete", report.summary_rows(summary))
        return summary
    task = prepare(job, directory)
    tokenizer = load_tokenizer(task.model)
    mesh = mesh_of(job.mesh)
    run = Run(job, directory, task, mesh, tokenizer, stop_tokens(tokenizer, locate(task.model)), MetricsLog(directory.metrics))
    reference = warm_start(run)
    model, params = run.load(reference)
    buffer = fill_buffer(run, model, params)
    objective = OBJECTIVES[job.objective].configure(**dataclasses.asdict(job.loss))
    statistics, probe = None, None
    if "references" in objective.needs:
        identity = reference_identity(model, params)
        probe = annotate(model, params, buffer, identity, prompts_per_batch=job.batch_size)
        print(f"step-zero probe of the sampler's statistics: {probe or 'there are none'}", file=sys.stderr)
        statistics = buffer.statistics(identity)
    state = passes(run, model, params, reference, buffer, objective, statistics)
    export(run, model, state.params(), directory.export)
    summary = summarise(run, buffer, probe, time.monotonic() - began)
    report.draw_learning_curve(run.log, directory.curve, f"{job.objective} on {job.data or job.task}")
    write_json(directory.summary, summary)
    report.print_table(f"{job.command}: {directory.path}", report.summary_rows(summary))
    return summary


def warm_start(run: Run) -> str | Path:
    """Where the reference's weights are: the task's model, after the job's supervised updates if there are any."""
    options = run.job.warm_start
    if not options.steps or run.job.objective == "sft":
        return run.task.model
    done = run.directory.reference
    if not done.exists():
        model, params = run.load(run.task.model)
        buffer = _demonstrations(run, run.directory.warm_start / "buffer", model)
        batches = Batches(buffer, "trajectory", options.batch_size, seed=run.job.seed, mesh=run.mesh)
        state = _fit(
            run, model, params, batches, OBJECTIVES["sft"], options.optimizer, options.steps,
            stage="warm start", checkpoints=Checkpoints(run.directory.warm_start / "checkpoints", keep=1),
            key=run.key(_WARM_START), marks=Marks(save=run.job.save_every),
        )
        export(run, model, state.params(), done)
    return done


def fill_buffer(run: Run, model, params) -> Buffer:
    """The replay buffer: someone's data, demonstrations, or samples of the reference with their rewards."""
    job, path = run.job, run.directory.buffer
    if job.data:
        read = {"shiq": formats.trajectories, "dpo": formats.preferences, "sft": formats.demonstrations}[job.objective]
        return _import(path, lambda: read(job.data, run.tokenizer), model)
    if job.objective == "sft":
        return _demonstrations(run, path, model)
    buffer = Buffer.open(path) if path.exists() else Buffer.create(path)
    options = job.collection
    done, rows = len(buffer) // options.samples_per_prompt, run.task.train
    sampler = Sampler(
        model, options.sampling, run.stops,
        samples_per_prompt=options.samples_per_prompt, prompts_per_batch=options.prompts_per_batch,
    )
    starts = range(done, len(rows), options.prompts_per_batch)
    for start in track(starts, "sampling", len(starts), "batches"):
        chunk = rows[start : start + options.prompts_per_batch]
        records = collect(
            sampler, params, run.tokenizer, chunk, run.task.reward,
            key=run.key(_SAMPLING), stop_tokens=run.stops, first=start,
        )
        if start == 0:
            _announce(records, len(rows) / len(chunk))
        buffer.append(records, vocab_size=model.config.vocab_size)
    return buffer


def passes(run: Run, model, params, reference: str | Path, buffer: Buffer, objective: Objective, statistics) -> State:
    """The policy after all passes over the buffer, evaluated on the way; what it was before is evaluation 0."""
    job, options = run.job, run.job.evaluation
    batches = Batches(
        buffer, objective.unit, job.batch_size, seed=job.seed, statistics=statistics, mesh=run.mesh,
        microbatches=job.microbatches, records=GroupMeanBaseline(buffer) if job.baseline == "group_mean" else None,
    )
    steps = batches.steps(job.epochs)
    evaluator = Evaluator(
        model, run.tokenizer, run.stops, run.task.held_out, run.task.reward, options.max_tokens,
        options.samples_per_prompt, options.prompts_per_batch, options.greedy,
    )

    def evaluate(weights, step: int) -> dict[str, float]:
        origin = run.load(reference)[1] if step else None
        numbers, samples = evaluator(weights, origin, jax.random.fold_in(run.key(_EVALUATION), step))
        run.log.write("evaluation", step, **numbers)
        run.directory.samples.mkdir(exist_ok=True)
        write_jsonl(run.directory.samples / f"{step:06d}.jsonl", samples[: _SHOWN * options.samples_per_prompt])
        return numbers

    if not run.log.rows("evaluation"):
        evaluate(params, 0)
    metric = "reward" if run.task.reward else None
    return _fit(
        run, model, params, batches, objective, job.optimizer, steps,
        stage="update", checkpoints=Checkpoints(run.directory.checkpoints, keep=job.keep, best=metric),
        key=run.key(_UPDATES), microbatches=job.microbatches,
        marks=Marks(evaluate=max(steps // options.times, 1) if options.times else None, save=job.save_every),
        evaluate=lambda state, step: evaluate(state.params(), step),
    )


def export(run: Run, model, params, path: Path) -> None:
    """Weights, configuration and tokenizer in Hugging Face format; the directory appears when it is complete."""
    partial = path.with_name(path.name + ".partial")
    if path.exists():
        return
    shutil.rmtree(partial, ignore_errors=True)
    save_hf(model, params, partial)
    run.tokenizer.save_pretrained(partial)
    partial.rename(path)


def summarise(run: Run, buffer: Buffer, probe: Mapping | None, seconds: float) -> dict[str, Any]:
    """The numbers of a run, out of its log."""
    evaluations, updates = run.log.rows("evaluation"), run.log.rows("update")
    before, after = evaluations[0], evaluations[-1]
    return {
        "command": run.job.command,
        "objective": run.job.objective,
        "seed": run.job.seed,
        "reward_before": before.get("reward"),
        "reward_after": after.get("reward"),
        "reward_stderr_before": before.get("reward_stderr"),
        "reward_stderr_after": after.get("reward_stderr"),
        "greedy_reward_before": before.get("greedy_reward"),
        "greedy_reward_after": after.get("greedy_reward"),
        "kl": after["kl"],
        "kl_stderr": after["kl_stderr"],
        "tokens_per_second": tokens_per_second(updates),
        "updates": len(updates),
        "records": len(buffer),
        "buffer_bytes": buffer.bytes,
        "probe": probe,
        "seconds": seconds,
        "machine": report.machine(),
    }


def _fit(
    run: Run, model, params, batches: Batches, objective: Objective, optimizer: Optimizer, steps: int, *,
    stage: str, checkpoints: Checkpoints, key, marks: Marks, microbatches: int = 1, evaluate: Callable | None = None,
) -> State:
    """Update from the newest checkpoint, or from `params`, to the last step."""
    rule = optimizer.build(steps)
    state = init_state(model, params, rule, key=key, mesh=run.mesh)
    if checkpoints.latest() is not None:
        state, _ = checkpoints.restore(state)
    run.log.rewind((stage, "evaluation") if evaluate else (stage,), int(state.step))
    state = run_passes(
        make_update(model, objective, rule, mesh=run.mesh, microbatches=microbatches), state, batches, steps,
        stage=stage, log=run.log, checkpoints=checkpoints, metadata={"stage": stage, "settings": run.job.settings()},
        learning_rate=optimizer.learning_rate_at(steps), marks=marks, evaluate=evaluate,
    )
    checkpoints.close()
    return state


def _demonstrations(run: Run, path: Path, model) -> Buffer:
    rows = run.directory.data / "demonstrations.jsonl"
    return _import(path, lambda: formats.demonstrations(rows, run.tokenizer), model)


def _import(path: Path, read: Callable[[], Iterable[Record]], model) -> Buffer:
    """A buffer of somebody's records, filled in one atomic append.

    Raises:
        Refusal: a record does not fit into the model's context or vocabulary; the buffer is then left as it was.
    """
    buffer = Buffer.open(path) if path.exists() else None
    if buffer is None or not len(buffer):
        records = list(read())
        for number, record in enumerate(records):
            if len(record.tokens) > model.config.max_positions:
                raise Refusal(
                    f"record {number} has {len(record.tokens)} tokens and the model's context holds "
                    f"{model.config.max_positions}: shorten it, leave it out, or take a model of longer context"
                )
        _announce(records)
        path.parent.mkdir(parents=True, exist_ok=True)
        buffer = buffer or Buffer.create(path)
        buffer.append(records, vocab_size=model.config.vocab_size)
    return buffer


def _announce(records: Sequence[Record], times: float = 1) -> None:
    """Say how large a buffer of `times` as many records like these will be, before it is written."""
    counts = (len(records), sum(len(r.tokens) for r in records), sum(len(r.rewards) for r in records))
    text = sum(len((r.group + (r.prompt or "")).encode()) for r in records)
    size = estimate_bytes(*(round(count * times) for count in counts), text_bytes=round(text * times))
    print(f"the buffer will hold {round(len(records) * times)} sequences in about {size / 1e6:.1f} MB", file=sys.stderr)
