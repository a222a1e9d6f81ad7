"""Where a run's prompts, demonstrations and rewards come from: toy, function calling, or files."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from shiq_jax.data import formats
from shiq_jax.errors import UserError
from shiq_jax.replay import Buffer
from shiq_jax.runs.options import Job
from shiq_jax.runs.run_directory import RunDirectory, write_json, write_jsonl
from shiq_jax.sharding import hosts
from shiq_jax.tasks import rewards


@dataclasses.dataclass(frozen=True)
class Task:
    """Model, prompts, demonstrations and reward of a run.

    Attributes:
        model: directory in Hugging Face format, or hub id.
        train: prompt rows to sample answers for.
        held_out: prompt rows to evaluate on; None to use the prompts of the data.
        demonstrations: rows with `prompt` and `completion`, for supervised updates.
        reward: scores the text of a completion to a row; None if there is none.
    """

    model: str
    train: Sequence[Mapping]
    held_out: Sequence[Mapping] | None
    demonstrations: Sequence[Mapping]
    reward: Callable[[Mapping, str], float] | None


def prepare(job: Job, run: RunDirectory) -> Task:
    """The task of a job; its rows are written to the run's `data/`, for inspection and reuse.

    Raises:
        UserError: the job names data without a model, leaves nothing to learn from, or names a reward or data set that
            cannot be had.
    """
    if job.data or job.prompts:
        task = _own(job)
    else:
        task = {"sorting": _sorting, "bfcl": _bfcl}[job.task](job, run)
    if job.evaluation.data:
        task = dataclasses.replace(task, held_out=formats.prompts(job.evaluation.data))
    if job.reward:
        task = dataclasses.replace(task, reward=rewards.resolve(job.reward))
    if not job.data and not (task.demonstrations if job.objective == "sft" else task.train):
        raise UserError(f"the demonstrations leave no prompt of the task {job.task} to learn on: ask for fewer of them")
    if task.held_out is not None:
        task = dataclasses.replace(task, held_out=task.held_out[: job.evaluation.prompts])
    hosts.on_writer(run.data.mkdir)(exist_ok=True)
    for name in ("train", "held_out", "demonstrations"):
        write_jsonl(run.data / f"{name}.jsonl", list(getattr(task, name) or ()))
    write_json(run.task, {"model": task.model})
    return task


def prompts_of(buffer: Buffer, count: int, longest: int) -> list[dict]:
    """The first `count` different prompts of a buffer: the tokens before the first action, and the record's own row.

    Prompts of more than `longest` tokens are skipped; UserError when none is short enough.
    """
    seen: dict[bytes, dict] = {}
    for number in range(len(buffer)):
        record = buffer[number]
        prefix = record.tokens[: int(np.argmax(record.action_mask))]
        if len(prefix) <= longest and prefix.tobytes() not in seen:
            row = json.loads(record.prompt) if record.prompt else {}
            seen[prefix.tobytes()] = {"id": record.group} | row | {"tokens": prefix.tolist()}
        if len(seen) == count:
            break
    if not seen:
        raise UserError(
            f"no prompt of the data has {longest} tokens or fewer, which would leave room in the model's context for "
            "an answer to evaluate: lower max_tokens of the evaluation"
        )
    return list(seen.values())


def _sorting(job: Job, run: RunDirectory) -> Task:
    """The toy: half of the demonstrations are reversed, which leaves the policy unsure of the direction."""
    from shiq_jax.tasks.sorting import sorting_rows
    from shiq_jax.tasks.tiny import tiny_directory

    if job.model is None and not run.model.exists():
        partial = run.model.with_name("model.partial")
        hosts.on_writer(os.rename)(tiny_directory(partial, job.seed), run.model)
    rows = sorting_rows(job.collection.prompts + _demonstrations(job), seed=job.seed)
    backwards = np.random.default_rng(job.seed).random(len(rows)) < 0.5
    return Task(
        model=str(job.model or run.model),
        train=rows[: job.collection.prompts],
        held_out=sorting_rows(job.evaluation.prompts, split="held_out", seed=job.seed),
        demonstrations=[
            row | {"completion": row["answer"][::-1] if turn else row["answer"]}
            for row, turn in list(zip(rows, backwards, strict=True))[job.collection.prompts :]
        ],
        reward=rewards.resolve("sorting"),
    )


def _bfcl(job: Job, run: RunDirectory) -> Task:
    """Function calling: the first training questions are demonstrated and the next ones sampled, without overlap."""
    from shiq_jax.tasks import bfcl, fetch

    train, held_out = bfcl.split_held_out(bfcl.load(fetch.bfcl()), seed=job.seed)
    shown = _demonstrations(job)
    return Task(
        model=job.model or str(fetch.smollm2()),
        train=train[shown : shown + job.collection.prompts],
        held_out=held_out,
        demonstrations=[row | {"completion": row["target"]} for row in train[:shown]],
        reward=rewards.resolve("bfcl"),
    )


def _demonstrations(job: Job) -> int:
    return job.warm_start.demonstrations if job.warm_start.steps or job.objective == "sft" else 0


def _own(job: Job) -> Task:
    """External data to learn from, or prompts to sample answers for."""
    given = "--data" if job.data else "--prompts"
    if job.model is None:
        raise UserError(f"{given} needs --model: the directory or hub id of the model that is to learn from it")
    if job.prompts and job.objective == "sft":
        raise UserError("--prompts gives nothing to imitate: give sft its demonstrations with --data")
    if job.prompts and job.reward is None:
        raise UserError("--prompts needs --reward: what scores the answers that are sampled (see docs/data.md)")
    train = formats.prompts(job.prompts)[: job.collection.prompts] if job.prompts else ()
    return Task(model=job.model, train=train, held_out=None, demonstrations=(), reward=None)
