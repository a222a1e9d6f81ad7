"""Files of the buffer: atomic writes, and Arrow shards that are memory-mapped and read as numpy views.

A shard is an Arrow stream with one record batch; `datasets.Dataset.from_file` opens it too.
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

# Annotation resumes at shard boundaries, so a large model should annotate a shard within minutes.
SHARD_ROWS = 4096
SHARD_BYTES = 64 << 20

_INT, _FLOAT, _BOOL, _TEXT = (
    pa.large_list(pa.int32()),
    pa.large_list(pa.float32()),
    pa.large_list(pa.bool_()),
    pa.large_string(),
)
_RECORD_SCHEMA_1 = pa.schema(
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
RECORD_SCHEMA = pa.schema(
    [
        *_RECORD_SCHEMA_1,
        pa.field("chosen", pa.bool_()),
        pa.field("label", pa.bool_()),
        pa.field("rank", pa.float64()),
        pa.field("score", pa.float64()),
    ]
)
# Schemas of record shards by schema version.
RECORD_SCHEMAS = {1: _RECORD_SCHEMA_1, 2: RECORD_SCHEMA}
STATISTICS_SCHEMA = pa.schema([pa.field("logp", _FLOAT, nullable=False), pa.field("lse", _FLOAT, nullable=False)])


@hosts.on_writer
def write_atomically(path: Path, write: Callable[[BinaryIO], None]) -> int:
    """Replace the file at `path` with the output of `write`, or leave it unchanged; returns the number of bytes.

    Writes to a temporary file, syncs it to disk, renames it, and syncs the directory.
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
        # Free the disk space of a partial file.
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise
    sync_directory(path.parent)
    return size


def sync_directory(path: Path) -> None:
    """Sync a directory to disk, so that created and renamed files survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@hosts.on_writer
def write_shard(path: Path, schema: pa.Schema, columns: dict[str, Sequence]) -> dict[str, int]:
    """Write one shard atomically; returns {"rows", "bytes", "crc32"} for the manifest.

    Args:
        path: the file to create.
        schema: `RECORD_SCHEMA` or `STATISTICS_SCHEMA`.
        columns: for each field a list with one entry per row: an array for list columns, otherwise a string, number or
            boolean; None for null.
    """
    batch = pa.record_batch([_to_arrow(field, columns[field.name]) for field in schema], schema=schema)

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
    """Copy a file atomically, in chunks of a few megabytes."""

    def write(file: BinaryIO) -> None:
        with open(source, "rb") as origin:
            while chunk := origin.read(1 << 22):
                file.write(chunk)

    write_atomically(target, write)


class Shard:
    """A memory-mapped shard; list columns are read as numpy views of the file, without copying.

    Raises UserError if the file is missing or truncated, has another schema, or does not have `rows` rows.
    """

    def __init__(self, path: Path, schema: pa.Schema, rows: int):
        try:
            self._batch = pa.ipc.open_stream(pa.memory_map(str(path))).read_next_batch()
            self._batch.validate()
        except FileNotFoundError as error:
            raise UserError(
                f"{path} is missing, but the manifest lists it; restore the file or rebuild the buffer."
            ) from error
        except (pa.ArrowException, OSError, StopIteration) as error:
            raise UserError(f"{path} is truncated or corrupt; restore the file or rebuild the buffer.") from error
        if not self._batch.schema.equals(schema):
            names = ", ".join(self._batch.schema.names)
            raise UserError(
                f"{path} has the columns {names}, but expected {', '.join(schema.names)}; restore the file or rebuild "
                "the buffer."
            )
        if self._batch.num_rows != rows:
            raise UserError(
                f"{path} has {self._batch.num_rows} rows, but the manifest expects {rows}; restore the file or rebuild "
                "the buffer."
            )
        self.path, self.rows, self._names = path, rows, frozenset(schema.names)
        self._views: dict[str, tuple[np.ndarray, np.ndarray, pa.Array]] = {}

    def get(self, name: str, row: int) -> np.ndarray | None:
        """One row of a list column as an array, or None if it is null."""
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
        """One row of a column of strings, numbers or booleans; None if it is null or the shard has no such column."""
        return self._batch.column(name)[row].as_py() if name in self._names else None

    def values(self, name: str) -> list:
        """A column of strings, numbers or booleans as a list; all None if the shard has no such column."""
        return self._batch.column(name).to_pylist() if name in self._names else [None] * self.rows

    def lengths(self, name: str) -> np.ndarray:
        """int64[rows]: number of entries in each row of a list column."""
        return np.diff(self._view(name)[0])

    def sums(self, name: str) -> np.ndarray:
        """float64[rows]: sum of each row of a float list column."""
        offsets, values, _ = self._view(name)
        totals, nonempty = np.zeros(self.rows), np.diff(offsets) > 0
        # Differences of one cumulative sum would give equal rows different sums, depending on their position.
        if nonempty.any():
            totals[nonempty] = np.add.reduceat(values[: offsets[-1]].astype(np.float64), offsets[:-1][nonempty])
        return totals

    def count(self, name: str) -> int:
        """Number of rows of a column that are not null."""
        return self.rows - self._batch.column(name).null_count if name in self._names else 0

    def _view(self, name: str) -> tuple[np.ndarray, np.ndarray, pa.Array]:
        if name not in self._views:
            column = self._batch.column(name)
            _, offsets, _, values = column.buffers()
            value_type = column.type.value_type
            # Arrow packs eight booleans into a byte.
            is_bits = pa.types.is_boolean(value_type)
            dtype = np.dtype(np.uint8 if is_bits else value_type.to_pandas_dtype())
            try:
                flat = np.frombuffer(values, dtype) if values is not None and values.size else np.zeros(0, dtype)
            except ValueError as error:
                raise UserError(f"{self.path} is corrupt; restore the file or rebuild the buffer.") from error
            self._views[name] = (np.frombuffer(offsets, np.int64)[: self.rows + 1], flat, column)
        return self._views[name]


def _to_arrow(field: pa.Field, rows: Sequence) -> pa.Array:
    if not pa.types.is_large_list(field.type):
        return pa.array(rows, field.type)
    is_null = np.array([row is None for row in rows], np.bool_)
    offsets = np.zeros(len(rows) + 1, np.int64)
    np.cumsum([0 if row is None else len(row) for row in rows], out=offsets[1:])
    arrays = [row for row in rows if row is not None]
    dtype = field.type.value_type.to_pandas_dtype()
    values = pa.array(
        np.concatenate(arrays).astype(dtype, copy=False) if arrays else np.zeros(0, dtype), field.type.value_type
    )
    return pa.LargeListArray.from_arrays(
        pa.array(offsets), values, type=field.type, mask=pa.array(is_null) if is_null.any() else None
    )
