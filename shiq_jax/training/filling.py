"""How a run's replay buffer is filled: from somebody's data, from demonstrations, or with scored samples."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from shiq_jax.data import formats
from shiq_jax.errors import Refusal
from shiq_jax.replay import Buffer, Record, estimate_bytes
from shiq_jax.rollout.collect import collect
from shiq_jax.rollout.generate import Sampler
from shiq_jax.training.metrics import track
from shiq_jax.training.run import Run, Use

# How somebody's rows become records, by the objective that learns from them.
READERS = {"shiq": formats.trajectories, "dpo": formats.preferences, "sft": formats.demonstrations}


def fill_buffer(run: Run, model, params) -> Buffer:
    """The replay buffer: someone's data, demonstrations, or samples of the reference with their rewards."""
    job, path = run.job, run.directory.buffer
    if job.data:
        return import_records(path, lambda: READERS[job.objective](job.data, run.tokenizer), model)
    if job.objective == "sft":
        return demonstrations(run, path, model)
    buffer = _open_or_create(path)
    options = job.collection
    done, rows = len(buffer) // options.samples_per_prompt, run.task.train
    sampler = Sampler(
        model, options.sampling, run.stops,
        samples_per_prompt=options.samples_per_prompt, prompts_per_batch=options.prompts_per_batch,
    )  # fmt: skip
    starts = range(done, len(rows), options.prompts_per_batch)
    for start in track(starts, "sampling", len(starts), "batches"):
        chunk = rows[start : start + options.prompts_per_batch]
        records = collect(
            sampler, params, run.tokenizer, chunk, run.task.reward,
            key=run.key(Use.SAMPLING), stop_tokens=run.stops, first=start,
        )  # fmt: skip
        if start == 0:
            _announce(records, len(rows) / len(chunk))
        buffer.append(records, vocab_size=model.config.vocab_size)
    return buffer


def demonstrations(run: Run, path: Path, model) -> Buffer:
    """A buffer of the task's demonstrations."""
    rows = run.directory.data / "demonstrations.jsonl"
    return import_records(path, lambda: formats.demonstrations(rows, run.tokenizer), model)


def import_records(path: Path, read: Callable[[], Iterable[Record]], model) -> Buffer:
    """A buffer of somebody's records, filled in one atomic append.

    Raises:
        Refusal: a record does not fit into the model's context or vocabulary; the buffer is then left as it was.
    """
    buffer = _open_or_create(path)
    if not len(buffer):
        records = list(read())
        for number, record in enumerate(records):
            if len(record.tokens) > model.config.max_positions:
                raise Refusal(
                    f"record {number} has {len(record.tokens)} tokens and the model's context holds "
                    f"{model.config.max_positions}: shorten it, leave it out, or take a model of longer context"
                )
        _announce(records)
        buffer.append(records, vocab_size=model.config.vocab_size)
    return buffer


def _open_or_create(path: Path) -> Buffer:
    if (path / "manifest.json").exists():
        return Buffer.open(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    return Buffer.create(path)


def _announce(records: Sequence[Record], times: float = 1) -> None:
    """Say how large a buffer of `times` as many records like these will be, before it is written."""
    counts = (len(records), sum(len(r.tokens) for r in records), sum(len(r.rewards) for r in records))
    text = sum(len((r.group + (r.prompt or "")).encode()) for r in records)
    size = estimate_bytes(*(round(count * times) for count in counts), text_bytes=round(text * times))
    print(f"the buffer will hold {round(len(records) * times)} sequences in about {size / 1e6:.1f} MB", file=sys.stderr)
