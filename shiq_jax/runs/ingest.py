"""Import of data files into a replay buffer."""

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

# Reader of data files by command.
READERS = {
    "shiq": formats.trajectories,
    "dpo": formats.preferences,
    "kto": formats.unpaired_preferences,
    "sft": formats.demonstrations,
}


def import_public_data(run: Run, model) -> Buffer:
    """A buffer of the public data of a private run."""
    return import_data(run, run.directory.public, run.job.public.data, model)


def import_data(run: Run, path: Path, source: str, model) -> Buffer:
    """A buffer of a data file, hub dataset or replay buffer, read with the job's options."""
    job, read = run.job, _read_buffer if is_buffer(source) else READERS[run.job.objective]
    return import_records(
        path, lambda context: read(source, run.tokenizer, context), model,
        score=job.score, reward=run.task.reward, drop_longer_than=job.drop_longer_than,
    )  # fmt: skip


def import_demonstrations(run: Run, path: Path, model) -> Buffer:
    """A buffer of the task's demonstrations."""
    rows = run.directory.data / "demonstrations.jsonl"
    return import_records(path, lambda context: formats.demonstrations(rows, run.tokenizer, context), model)


def import_records(
    path: Path,
    read: Callable[[ImportContext], Iterable[Record]],
    model,
    *,
    score: str | None = None,
    reward: Callable[[Mapping, str], float] | None = None,
    drop_longer_than: int | None = None,
) -> Buffer:
    """A buffer of imported records, filled in one atomic append that holds one shard in memory at a time.

    Args:
        path: directory of the buffer; created if missing. A buffer with records is returned unchanged.
        read: yields the records of a source that `ImportContext.validate_and_accept` accepts.
        model: model whose context and vocabulary the records must fit.
        score: field that holds the scores, see `ImportContext`.
        reward: scores the answers of sources without scores.
        drop_longer_than: sequences longer than this, or than the context, are skipped and counted; None raises an error
            for sequences longer than the context.

    Raises:
        UserError: a record exceeds the model's context or vocabulary, or no record is left; the buffer is unchanged.
    """
    buffer = open_or_create(path)
    if not len(buffer):
        context = ImportContext(score=score, reward=reward, vocab_size=model.config.vocab_size)
        context.accept = _length_filter(context, model.config, drop_longer_than)
        amount = ("tokens", lambda record: len(record.tokens))
        records = track(read(context), "reading data", unit="records", amount=amount)
        # The reader validates each record, with the row's number in the error message.
        added = buffer.append(records, check=False)
        skipped = ", ".join(f"{count} {reason}" for reason, count in context.skipped.items() if count)
        if not added:
            raise UserError(f"the data contain no usable record (skipped: {skipped}): correct the rows")
        if skipped:
            print(f"skipped rows of the data: {skipped}", file=sys.stderr)
        print(f"the buffer holds {added} sequences in {buffer.bytes / 1e6:.1f} MB", file=sys.stderr)
    return buffer


def _read_buffer(source: str, tokenizer, context: ImportContext) -> Iterator[Record]:
    """The records of another replay buffer, with their sampler's token statistics."""
    if context.score is not None:
        raise UserError(f"{source} is a replay buffer, whose records already have rewards: omit --score")
    buffer = Buffer.open(source)
    buffer.verify()
    for number in range(len(buffer)):
        record = buffer[number]
        with formats.located_errors(f"{source}, record {number}"):
            accepted = context.validate_and_accept(record)
        if accepted:
            yield record


def _length_filter(
    context: ImportContext, config: DecoderConfig, drop_longer_than: int | None
) -> Callable[[Record], bool]:
    """A predicate that skips records that are too long, or raises UserError if none may be skipped."""
    max_positions = config.max_positions
    limit = max_positions if drop_longer_than is None else min(drop_longer_than, max_positions)

    def accept(record: Record) -> bool:
        stopping.check("while reading the data; the import restarts on resume")
        if len(record.tokens) <= limit:
            return True
        if drop_longer_than is None:
            raise UserError(
                f"it has {len(record.tokens)} tokens and the model's context holds {max_positions}: shorten or remove "
                "it, use a model with a longer context, or skip long sequences with --drop-longer-than"
            )
        context.skipped[f"sequences of more than {limit} tokens"] += 1
        return False

    return accept


def open_or_create(path: Path) -> Buffer:
    """Open a buffer and verify its checksums, or create an empty one."""
    if is_buffer(path):
        buffer = Buffer.open(path)
        # Without the checksums, training would silently continue on damaged data.
        buffer.verify()
        return buffer
    hosts.on_writer(path.parent.mkdir)(parents=True, exist_ok=True)
    return Buffer.create(path)
