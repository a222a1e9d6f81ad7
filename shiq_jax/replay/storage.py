"""Files of the buffer: atomic writing, and Arrow shards that are mapped into memory and read as numpy views.

A shard is one Arrow stream with one record batch, which `datasets.Dataset.from_file` opens as well.
"""

import os
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa

from shiq_jax.errors import UserError
from shiq_jax.sharding import hosts

TEMPORARY = ".tmp"

# Annotation can be interrupted between shards, so a shard is at most minutes of a large model's work.
SHARD_ROWS = 4096
SHARD_BYTES = 64 << 20

_INT, _FLOAT, _BOOL, _TEXT = (
    pa.large_list(pa.int32()),
    pa.large_list(pa.float32()),
    pa.large_list(pa.bool_()),
    pa.large_string(),
)
_RECORDS_1 = pa.schema(
    [
        pa.field("tokens", _INT, nullable=False),
        pa.field("action_mask", _BOOL, nullable=False),
        pa.field("rewards", _FLOAT, nullable=False),
        pa.field("behaviour_logp", _FLOAT),
        pa.field("logp", _FLOAT),
        pa.field("lse", _FLOAT),
        pa.field("group", _TEXT, nullable=False),
        pa.field("prompt", _TEXT),
        pa.field("user", _TEXT),
    ]
)
RECORDS = pa.schema(
    [
        *_RECORDS_1,
        pa.field("chosen", pa.bool_()),
        pa.field("label", pa.bool_()),
        pa.field("rank", pa.float64()),
        pa.field("score", pa.float64()),
    ]
)
# The columns of record shards by the schema version of the buffer that wrote them.
RECORD_SCHEMAS = {1: _RECORDS_1, 2: RECORDS}
ANNOTATIONS = pa.schema([pa.field("logp", _FLOAT, nullable=False), pa.field("lse", _FLOAT, nullable=False)])


@hosts.on_writer
def write_atomically(path: Path, write: Callable[[BinaryIO], None]) -> int:
    """Makes `path` hold what `write` writes, or leaves it as it was; returns the bytes written.

    The bytes reach the disk under a temporary name before the name is changed, and the directory is synchronised after.
    """
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
            size = file.tell()
        os.replace(temporary, path)
    except BaseException as error:
        # What a full disk could take of the file would only keep it full.
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise
    sync_directory(path.parent)
    return size


def sync_directory(path: Path) -> None:
    """Makes names created or changed in the directory survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@hosts.on_writer
def write_shard(path: Path, schema: pa.Schema, columns: dict[str, Sequence]) -> dict[str, int]:
    """Writes one shard atomically; returns {"rows", "bytes", "crc32"} for the manifest.

    Args:
        path: the file to make.
        schema: `RECORDS` or `ANNOTATIONS`.
        columns: for each field a list with one entry per row: a flat array, a string, a number, a truth value, or None
            where the field allows it.
    """
    batch = pa.record_batch([_arrow(field, columns[field.name]) for field in schema], schema=schema)

    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema) as stream:
        stream.write_batch(batch)
    content = sink.getvalue()
    size = write_atomically(path, lambda file: file.write(content))
    return {"rows": batch.num_rows, "bytes": size, "crc32": zlib.crc32(content)}


def checksum(path: Path) -> int:
    """CRC-32 of the file's bytes."""
    value = 0
    with open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            value = zlib.crc32(chunk, value)
    return value


def copy_file(source: Path, target: Path) -> None:
    """Copies a file atomically, a few megabytes at a time."""

    def write(file: BinaryIO) -> None:
        with open(source, "rb") as origin:
            while chunk := origin.read(1 << 22):
                file.write(chunk)

    write_atomically(target, write)


class Shard:
    """One mapped shard; its numbers are read-only numpy views of the file, made without copying.

    Raises UserError naming the file when it is missing, truncated, of another schema, or has other than `rows` rows.
    """

    def __init__(self, path: Path, schema: pa.Schema, rows: int):
        try:
            self._batch = pa.ipc.open_stream(pa.memory_map(str(path))).read_next_batch()
            self._batch.validate()
        except FileNotFoundError as error:
            raise UserError(
                f"{path} is missing, though the manifest lists it; restore the file or make the buffer anew."
            ) from error
        except (pa.ArrowException, OSError, StopIteration) as error:
            raise UserError(f"{path} is truncated or corrupt; restore the file or make the buffer anew.") from error
        if not self._batch.schema.equals(schema):
            found = ", ".join(self._batch.schema.names)
            raise UserError(
                f"{path} holds the columns {found}, expected are {', '.join(schema.names)}; it was written by "
                "something else."
            )
        if self._batch.num_rows != rows:
            raise UserError(
                f"{path} holds {self._batch.num_rows} rows, but the manifest says {rows}; restore the file or make "
                "the buffer anew."
            )
        self.path, self.rows, self._names = path, rows, frozenset(schema.names)
        self._views: dict[str, tuple[np.ndarray, np.ndarray, pa.Array]] = {}

    def get(self, name: str, row: int) -> np.ndarray | None:
        """The flat array of one row of a list column, or None where the row has none."""
        offsets, values, column = self._view(name)
        if column.null_count and not column[row].is_valid:
            return None
        start, end = int(offsets[row]), int(offsets[row + 1])
        if values.dtype != np.uint8:
            return values[start:end]
        first = start // 8
        bits = np.unpackbits(values[first : (end + 7) // 8], bitorder="little")
        return bits[start - 8 * first : end - 8 * first].astype(np.bool_)

    def value(self, name: str, row: int) -> str | bool | float | None:
        """One row of a column of strings, numbers or truth values; None where the shard lacks the column."""
        return self._batch.column(name)[row].as_py() if name in self._names else None

    def values(self, name: str) -> list:
        """A whole column of strings, numbers or truth values; None in every row where the shard lacks it."""
        return self._batch.column(name).to_pylist() if name in self._names else [None] * self.rows

    def lengths(self, name: str) -> np.ndarray:
        """int64[rows]: the entries that each row of a list column has."""
        return np.diff(self._view(name)[0])

    def sums(self, name: str) -> np.ndarray:
        """float64[rows]: the sum of each row of a float column."""
        offsets, values, _ = self._view(name)
        totals, filled = np.zeros(self.rows), np.diff(offsets) > 0
        # Segment by segment, not as differences of one running sum: equal rows must have equal sums, wherever they lie.
        if filled.any():
            totals[filled] = np.add.reduceat(values[: offsets[-1]].astype(np.float64), offsets[:-1][filled])
        return totals

    def present(self, name: str) -> int:
        """How many rows of a column are not null."""
        return self.rows - self._batch.column(name).null_count if name in self._names else 0

    def _view(self, name: str) -> tuple[np.ndarray, np.ndarray, pa.Array]:
        if name not in self._views:
            column = self._batch.column(name)
            _, offsets, _, values = column.buffers()
            kind = column.type.value_type
            dtype = np.dtype(np.uint8) if pa.types.is_boolean(kind) else np.dtype(kind.to_pandas_dtype())
            try:
                flat = np.frombuffer(values, dtype) if values is not None and values.size else np.zeros(0, dtype)
            except ValueError as error:
                raise UserError(f"{self.path} is corrupt; restore the file or make the buffer anew.") from error
            self._views[name] = (np.frombuffer(offsets, np.int64)[: self.rows + 1], flat, column)
        return self._views[name]


def _arrow(field: pa.Field, rows: Sequence) -> pa.Array:
    if not pa.types.is_large_list(field.type):
        return pa.array(rows, field.type)
    absent = np.array([row is None for row in rows], np.bool_)
    offsets = np.zeros(len(rows) + 1, np.int64)
    np.cumsum([0 if row is None else len(row) for row in rows], out=offsets[1:])
    present = [row for row in rows if row is not None]
    dtype = field.type.value_type.to_pandas_dtype()
    values = pa.array(
        np.concatenate(present).astype(dtype, copy=False) if present else np.zeros(0, dtype), field.type.value_type
    )
    return pa.LargeListArray.from_arrays(
        pa.array(offsets), values, type=field.type, mask=pa.array(absent) if absent.any() else None
    )
