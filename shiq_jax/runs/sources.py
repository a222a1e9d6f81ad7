"""Sources of a run's prompts, demonstrations and rewards: sorting, function calling, or files."""

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
        held_out: prompt rows to evaluate on; None to use the prompts of the training data.
        demonstrations: rows with `prompt` and `completion` for supervised updates.
        reward: scores a completion: (row, text) -> float; None without a reward.
    """

    model: str
    train: Sequence[Mapping]
    held_out: Sequence[Mapping] | None
    demonstrations: Sequence[Mapping]
    reward: Callable[[Mapping, str], float] | None


def prepare_task(job: Job, run: RunDirectory) -> Task:
    """The task of a job; its rows are written to the run's `data/` for inspection and reuse.

    Raises:
        UserError: external data come without a model, no training prompts are left, or a reward or dataset is missing.
    """
    if job.data or job.prompts:
        task = _external_task(job)
    else:
        task = {"sorting": _sorting, "bfcl": _bfcl}[job.task](job, run)
    if job.evaluation.data:
        task = dataclasses.replace(task, held_out=formats.prompts(job.evaluation.data))
    if job.reward:
        task = dataclasses.replace(task, reward=rewards.resolve(job.reward))
    if not job.data and not (task.demonstrations if job.objective == "sft" else task.train):
        raise UserError(
            f"the demonstrations use all prompts of the task {job.task}, so none is left to train on: lower "
            "--warm-start.demonstrations"
        )
    if task.held_out is not None:
        task = dataclasses.replace(task, held_out=task.held_out[: job.evaluation.prompts])
    hosts.on_writer(run.data.mkdir)(exist_ok=True)
    for name in ("train", "held_out", "demonstrations"):
        write_jsonl(run.data / f"{name}.jsonl", list(getattr(task, name) or ()))
    write_json(run.task, {"model": task.model})
    return task


def prompts_from_buffer(buffer: Buffer, count: int, max_length: int) -> list[dict]:
    """The first `count` distinct prompts of a buffer: the tokens before the first action, and the prompt row if stored.

    Prompts of more than `max_length` tokens are skipped; raises UserError if no prompt is left.
    """
    prompts: dict[bytes, dict] = {}
    for number in range(len(buffer)):
        record = buffer[number]
        prefix = record.tokens[: int(np.argmax(record.action_mask))]
        if len(prefix) <= max_length and prefix.tobytes() not in prompts:
            row = json.loads(record.prompt) if record.prompt else {}
            prompts[prefix.tobytes()] = {"id": record.group} | row | {"tokens": prefix.tolist()}
        if len(prompts) == count:
            break
    if not prompts:
        raise UserError(
            f"no prompt of the data has {max_length} tokens or fewer, so none leaves room in the model's context for "
            "an answer: lower max_tokens of the evaluation"
        )
    return list(prompts.values())


def _sorting(job: Job, run: RunDirectory) -> Task:
    """The toy task. Half of the demonstrations are reversed, so that the reference sorts in a random direction."""
    from shiq_jax.tasks.sorting import sorting_rows
    from shiq_jax.tasks.tiny import tiny_directory

    if job.model is None and not run.model.exists():
        partial = run.model.with_name("model.partial")
        hosts.on_writer(os.rename)(tiny_directory(partial, job.seed), run.model)
    rows = sorting_rows(job.collection.prompts + _demonstration_count(job), seed=job.seed)
    is_reversed = np.random.default_rng(job.seed).random(len(rows)) < 0.5
    return Task(
        model=str(job.model or run.model),
        train=rows[: job.collection.prompts],
        held_out=sorting_rows(job.evaluation.prompts, split="held_out", seed=job.seed),
        demonstrations=[
            row | {"completion": row["answer"][::-1] if reverse else row["answer"]}
            for row, reverse in list(zip(rows, is_reversed, strict=True))[job.collection.prompts :]
        ],
        reward=rewards.resolve("sorting"),
    )


def _bfcl(job: Job, run: RunDirectory) -> Task:
    """Function calling: the first training questions become demonstrations, the next ones prompts, without overlap."""
    from shiq_jax.tasks import bfcl, fetch

    train, held_out = bfcl.split_held_out(bfcl.load(fetch.bfcl()), seed=job.seed)
    count = _demonstration_count(job)
    return Task(
        model=job.model or str(fetch.smollm2()),
        train=train[count : count + job.collection.prompts],
        held_out=held_out,
        demonstrations=[row | {"completion": row["target"]} for row in train[:count]],
        reward=rewards.resolve("bfcl"),
    )


def _demonstration_count(job: Job) -> int:
    return job.warm_start.demonstrations if job.warm_start.steps or job.objective == "sft" else 0


def _external_task(job: Job) -> Task:
    """Training on external data, or on sampled answers to external prompts."""
    flag = "--data" if job.data else "--prompts"
    if job.model is None:
        raise UserError(f"{flag} needs --model: set it to the directory or hub id of the model to train")
    if job.prompts and job.objective == "sft":
        raise UserError("sft needs demonstrations, not prompts: replace --prompts with --data")
    if job.prompts and job.reward is None:
        raise UserError("--prompts needs --reward to score the sampled answers: set it, see docs/data.md")
    train = formats.prompts(job.prompts)[: job.collection.prompts] if job.prompts else ()
    return Task(model=job.model, train=train, held_out=None, demonstrations=(), reward=None)
