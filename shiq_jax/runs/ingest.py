"""Rows of data files as records of a replay buffer."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from shiq_jax import stopping
from shiq_jax.data import formats
from shiq_jax.data.import_context import ImportContext
from shiq_jax.errors import UserError
from shiq_jax.models import DecoderConfig
from shiq_jax.progress import track
from shiq_jax.replay import Buffer, Record, is_buffer
from shiq_jax.runs.run import Run
from shiq_jax.sharding import hosts

# How somebody's rows become records, by the objective that learns from them.
READERS = {
    "shiq": formats.trajectories,
    "dpo": formats.preferences,
    "kto": formats.unpaired_preferences,
    "sft": formats.demonstrations,
}


def public_buffer(run: Run, model) -> Buffer:
    """The public data of a private run."""
    return imported(run, run.directory.public, run.job.public.data, model)


def imported(run: Run, path: Path, source: str, model) -> Buffer:
    """A buffer of somebody's rows, as the job's options say that they are read."""
    job, read = run.job, _replayed if is_buffer(source) else READERS[run.job.objective]
    return import_records(
        path, lambda reading: read(source, run.tokenizer, reading), model,
        score=job.score, reward=run.task.reward, drop_longer_than=job.drop_longer_than,
    )  # fmt: skip


def demonstrations(run: Run, path: Path, model) -> Buffer:
    """A buffer of the task's demonstrations."""
    rows = run.directory.data / "demonstrations.jsonl"
    return import_records(path, lambda reading: formats.demonstrations(rows, run.tokenizer, reading), model)


def import_records(
    path: Path,
    read: Callable[[ImportContext], Iterable[Record]],
    model,
    *,
    score: str | None = None,
    reward: Callable[[Mapping, str], float] | None = None,
    drop_longer_than: int | None = None,
) -> Buffer:
    """A buffer of somebody's records, filled in one atomic append that holds one shard in memory at a time.

    Args:
        path: of the buffer, made when it is not there; a buffer with records is left as it is.
        read: gives the records of a source, those that `ImportContext.validate_and_accept` accepts.
        model: whose context and vocabulary the records must fit.
        score: the field that holds scores, see `ImportContext`.
        reward: scores answers of sources without scores.
        drop_longer_than: sequences of more tokens than this, or than the context, are left out and counted; None
            refuses those that are longer than the context.

    Raises:
        UserError: a record does not fit into the model's context or vocabulary, or none is left; the buffer is then left
            as it was.
    """
    buffer = open_or_create(path)
    if not len(buffer):
        reading = ImportContext(score=score, reward=reward, vocab_size=model.config.vocab_size)
        reading.accept = _fits(reading, model.config, drop_longer_than)
        amount = ("tokens", lambda record: len(record.tokens))
        records = track(read(reading), "reading data", unit="records", amount=amount)
        # The reader validates each record, and names the row in what it says.
        added = buffer.append(records, check=False)
        left_out = ", ".join(f"{count} {reason}" for reason, count in reading.left_out.items() if count)
        if not added:
            raise UserError(
                f"nothing of the data can be learned from, for all was left out ({left_out}): mend the rows"
            )
        if left_out:
            print(f"left out of the data: {left_out}", file=sys.stderr)
        print(f"the buffer holds {added} sequences in {buffer.bytes / 1e6:.1f} MB", file=sys.stderr)
    return buffer


def _replayed(source: str, tokenizer, reading: ImportContext) -> Iterator[Record]:
    """The records of another replay buffer, with the statistics of their sampler."""
    if reading.score is not None:
        raise UserError(f"{source} is a replay buffer, whose records have their rewards: leave --score out")
    buffer = Buffer.open(source)
    buffer.verify()
    for number in range(len(buffer)):
        record = buffer[number]
        with formats.located_errors(f"{source}, record {number}"):
            accepted = reading.validate_and_accept(record)
        if accepted:
            yield record


def _fits(reading: ImportContext, config: DecoderConfig, longest: int | None) -> Callable[[Record], bool]:
    """What decides whether a record is short enough; it refuses one that exceeds the context."""
    context = config.max_positions
    limit = context if longest is None else min(longest, context)

    def accept(record: Record) -> bool:
        stopping.check("while reading the data, which then begins again")
        if len(record.tokens) <= limit:
            return True
        if longest is None:
            raise UserError(
                f"it has {len(record.tokens)} tokens and the model's context holds {context}: shorten it, leave it "
                "out, take a model of longer context, or let --drop-longer-than leave out what is too long"
            )
        reading.left_out[f"sequences of more than {limit} tokens"] += 1
        return False

    return accept


def open_or_create(path: Path) -> Buffer:
    """The buffer of a run that goes on, held against its checksums, or an empty one."""
    if is_buffer(path):
        buffer = Buffer.open(path)
        # What a run goes on with is read once as a whole: a damaged number would only be learned from.
        buffer.verify()
        return buffer
    hosts.on_writer(path.parent.mkdir)(parents=True, exist_ok=True)
    return Buffer.create(path)
