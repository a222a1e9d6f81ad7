"""The replay buffer: an append-only directory of memory-mapped Arrow shards.

    buffer/
      manifest.json                     lists every shard; written last, so a crash leaves the buffer unchanged
      records-00000.arrow               each append writes one or more shards
      statistics/<digest>/00000.arrow   token statistics of one model for the record shard of the same number

A buffer has one writer at a time and any number of readers. Each reader sees the buffer as it was when opened.
"""

import bisect
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64

from shiq_jax.errors import UserError
from shiq_jax.replay import report, storage
from shiq_jax.replay.manifest import SCHEMA_VERSION, Manifest, check_available, remove_leftovers
from shiq_jax.replay.records import FEEDBACK, STATISTICS, Record, validate
from shiq_jax.replay.stored_statistics import Identity, StoredStatistics, check_statistics, missing_statistics_error
from shiq_jax.sharding import hosts

_COLUMNS = tuple(field.name for field in storage.RECORD_SCHEMA)
_SCALARS = ("group", "prompt", "user", *FEEDBACK)


class Buffer:
    """A replay buffer on disk; construct it with `Buffer.create(path)` or `Buffer.open(path)`.

    `len(buffer)` is the number of records. `buffer[i]` is the `i`-th Record; its tokens, rewards and statistics are
    read-only views of the file.
    """

    def __init__(self, path: Path, manifest: Manifest):
        self.path = path
        self.manifest = manifest
        self._shards: dict[str, storage.Shard] = {}
        self._starts: list[int] = []
        self._index()

    @classmethod
    def create(cls, path: str | Path) -> "Buffer":
        """Create an empty buffer; raises UserError if `path` is already a buffer or contains other files."""
        path = Path(path)
        check_available(path)
        hosts.on_writer(path.mkdir)(parents=True, exist_ok=True)
        manifest = Manifest()
        manifest.save(path)
        return cls(path, manifest)

    @classmethod
    def open(cls, path: str | Path) -> "Buffer":
        """Open a buffer; raises UserError if it is not one, or a file is missing or has the wrong size."""
        path = Path(path)
        manifest = Manifest.load(path)
        for entry in [*manifest.shards, *manifest.sidecars()]:
            file = path / entry["file"]
            size = file.stat().st_size if file.exists() else None
            if size != entry["bytes"]:
                state = "is missing" if size is None else f"has {size} bytes"
                raise UserError(
                    f"{file} {state}; the manifest expects {entry['bytes']} bytes. Restore the file or rebuild the "
                    "buffer."
                )
        return cls(path, manifest)

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> Record:
        number, row = self._locate(index)
        shard = self._shard(number)
        arrays = {name: shard.get(name, row) for name in ("tokens", "action_mask", "rewards", *STATISTICS)}
        return Record(**arrays, **{name: shard.value(name, row) for name in _SCALARS})

    def read(self, indices: Sequence[int]) -> list[Record]:
        """The records at `indices`, in that order; raises IndexError if an index is out of range."""
        return [self[int(index)] for index in indices]

    # ---- appending ----

    def append(self, records: Iterable[Record], *, vocab_size: int | None = None, check: bool = True) -> int:
        """Append the records atomically and return their number.

        If a record is invalid or the process dies, the buffer is unchanged.

        Args:
            records: consumed one shard at a time.
            vocab_size: token ids must be less than this; None skips the check.
            check: whether to `validate` each record; pass False for records that are already validated.
        """
        self._begin_writing()
        entries: list[dict[str, Any]] = []
        try:
            for shard in _group_into_shards(_validated(records, vocab_size) if check else records):
                entries.append(self._write_records(len(self.manifest.shards) + len(entries), shard))
        except BaseException:
            hosts.on_writer(remove_leftovers, wait=False)(self.path, self.manifest.files())
            raise
        if entries:
            self._commit(Manifest(self.manifest.shards + entries, self.manifest.statistics))
        return sum(entry["rows"] for entry in entries)

    def _write_records(self, number: int, records: list[Record]) -> dict[str, Any]:
        name = f"records-{number:05d}.arrow"
        columns = {column: [getattr(record, column) for record in records] for column in _COLUMNS}
        file_info = storage.write_shard(self.path / name, storage.RECORD_SCHEMA, columns)
        tokens, actions = sum(len(r.tokens) for r in records), sum(len(r.rewards) for r in records)
        return {"file": name, "schema": SCHEMA_VERSION, "tokens": tokens, "actions": actions, **file_info}

    def _begin_writing(self) -> None:
        if Manifest.load(self.path) != self.manifest:
            raise UserError(
                f"{self.path} was modified by another process since it was opened; reopen it before writing."
            )
        remove_leftovers(self.path, self.manifest.files())

    def _commit(self, manifest: Manifest) -> None:
        manifest.save(self.path)
        self.manifest = manifest
        self._index()

    # ---- contents ----

    @property
    def shards(self) -> list[range]:
        """The record indices of each shard."""
        return [range(start, end) for start, end in itertools.pairwise(self._starts)]

    @property
    def bytes(self) -> int:
        """Total size of all shards, including statistics."""
        return sum(entry["bytes"] for entry in [*self.manifest.shards, *self.manifest.sidecars()])

    def record_files(self) -> list[Path]:
        """Paths of the record shards, in order; `datasets.Dataset.from_file` can open each of them."""
        return [self.path / entry["file"] for entry in self.manifest.shards]

    def group_ids(self) -> list[str]:
        """The group name of every record, in record order."""
        return self.column("group")

    def user_ids(self) -> list[str | None]:
        """The user of every record, in record order; None where it is not recorded."""
        return self.column("user")

    def column(self, name: str) -> list:
        """Values of group, prompt, user, chosen, label, rank or score for every record; None where missing."""
        if name not in _SCALARS:
            raise ValueError(f"column is {name!r}; choose one of {', '.join(_SCALARS)}.")
        return [value for number in range(len(self.shards)) for value in self._shard(number).values(name)]

    def lengths(self) -> Int64[np.ndarray, " records"]:
        """Number of tokens of every record."""
        return self._concatenate(np.int64, lambda shard: shard.lengths("tokens"))

    def actions(self) -> Int64[np.ndarray, " records"]:
        """Number of actions of every record."""
        return self._concatenate(np.int64, lambda shard: shard.lengths("rewards"))

    def returns(self) -> Float64[np.ndarray, " records"]:
        """Undiscounted return of every record."""
        return self._concatenate(np.float64, lambda shard: shard.sums("rewards"))

    def coverage(self) -> dict[str, int]:
        """Number of records that have each optional column."""
        names = (*STATISTICS, "prompt", "user", *FEEDBACK)
        return {name: sum(self._shard(number).count(name) for number in range(len(self.shards))) for name in names}

    def describe(self) -> dict[str, Any]:
        """Counts, quantiles, statistics identities and a sample record as JSON values; see `shiq_jax.replay.report`."""
        return report.describe(self)

    def report(self) -> str:
        """Verify all checksums and return `describe` as human-readable text."""
        self.verify()
        return report.render(self.describe())

    def verify(self) -> None:
        """Check the CRC-32 of every file; raises UserError naming the first one that does not match the manifest."""
        for entry in [*self.manifest.shards, *self.manifest.sidecars()]:
            if storage.checksum(self.path / entry["file"]) != entry["crc32"]:
                raise UserError(
                    f"{self.path / entry['file']} is corrupt: its checksum does not match the manifest; restore the "
                    "file."
                )

    # ---- statistics ----

    def identities(self) -> list[tuple[Identity, list[int]]]:
        """Every identity with stored statistics, and the shard numbers that it covers."""
        entries = self.manifest.statistics.values()
        return [(Identity(entry["identity"]), sorted(int(number) for number in entry["shards"])) for entry in entries]

    def missing_statistics(self, identity: Identity) -> list[int]:
        """Shard numbers that have no statistics under this identity yet."""
        entries = self._statistics_entries(identity)
        return [number for number in range(len(self.shards)) if str(number) not in entries]

    def write_statistics(self, identity: Identity, shard: int, values: Sequence[tuple[np.ndarray, np.ndarray]]) -> None:
        """Store the token statistics of one shard atomically.

        An interrupted annotation resumes with the shards in `missing_statistics`.

        Args:
            identity: what computed the statistics.
            shard: number of the shard.
            values: (logp float[A], lse float[A]) in nats for each record of the shard.

        Raises:
            UserError: the shard does not exist or already has these statistics, or the values do not match its records.
        """
        if not 0 <= shard < len(self.shards):
            raise UserError(f"{self.path} has {len(self.shards)} shards, but statistics were passed for shard {shard}.")
        if shard not in self.missing_statistics(identity):
            raise UserError(f"{self.path} already has statistics of shard {shard} computed by {identity}.")
        check_statistics(values, self._shard(shard).lengths("rewards"), self._starts[shard])
        self._begin_writing()
        name = f"statistics/{Identity(identity).digest}/{shard:05d}.arrow"
        for directory in (self.path / "statistics", (self.path / name).parent):
            hosts.on_writer(directory.mkdir)(exist_ok=True)
            storage.sync_directory(directory.parent)
        logp, lse = ([np.asarray(pair[k], np.float32) for pair in values] for k in (0, 1))
        file_info = storage.write_shard(self.path / name, storage.STATISTICS_SCHEMA, {"logp": logp, "lse": lse})
        self._add_statistics(identity, {str(shard): {"source": "file", "file": name, **file_info}})

    def adopt_sampler_statistics(self, identity: Identity) -> None:
        """Use the records' sampler (logp, lse) as this identity's statistics in every shard that has none.

        Nothing is copied. Raises UserError if a record of such a shard has no lse.
        """
        missing = self.missing_statistics(identity)
        for number in missing:
            shard = self._shard(number)
            for row in range(shard.rows if shard.count("lse") < shard.rows else 0):
                if shard.get("lse", row) is None:
                    raise UserError(
                        f"{self.path}: record {self._starts[number] + row} has no lse from its sampler, so sampler "
                        "statistics cannot serve as reference statistics; annotate the buffer with the reference."
                    )
        if missing:
            self._begin_writing()
            self._add_statistics(identity, {str(number): {"source": "records"} for number in missing})

    def statistics(self, identity: Identity) -> StoredStatistics:
        """This identity's statistics of all records; raises UserError if any are missing."""
        identity = Identity(identity)
        entries = self._statistics_entries(identity)
        if not entries and len(self):
            raise missing_statistics_error(self, identity, self.manifest.statistics)
        if missing := self.missing_statistics(identity):
            raise UserError(
                f"{self.path} has statistics computed by {identity} for only {len(self.shards) - len(missing)} of "
                f"{len(self.shards)} shards; finish the annotation with that model."
            )

        def get(index: int) -> tuple[np.ndarray, np.ndarray]:
            number, row = self._locate(index)
            entry = entries[str(number)]
            shard = self._shard(number) if entry["source"] == "records" else self._sidecar(entry)
            return shard.get("logp", row), shard.get("lse", row)

        return StoredStatistics(identity, len(self), get)

    def _add_statistics(self, identity: Identity, shards: dict[str, dict[str, Any]]) -> None:
        statistics = dict(self.manifest.statistics)
        statistics[Identity(identity).digest] = {
            "identity": dict(identity),
            "shards": {**self._statistics_entries(identity), **shards},
        }
        self._commit(Manifest(self.manifest.shards, statistics))

    def _statistics_entries(self, identity: Identity) -> dict[str, dict[str, Any]]:
        return self.manifest.statistics.get(Identity(identity).digest, {}).get("shards", {})

    # ---- internals ----

    def _index(self) -> None:
        self._starts = [0, *np.cumsum([shard["rows"] for shard in self.manifest.shards], dtype=np.int64).tolist()]

    def _locate(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"record index {index} is out of range: {self.path} has {len(self)} records.")
        number = bisect.bisect_right(self._starts, index) - 1
        return number, int(index) - self._starts[number]

    def _shard(self, number: int) -> storage.Shard:
        entry = self.manifest.shards[number]
        if entry["file"] not in self._shards:
            schema = storage.RECORD_SCHEMAS[entry["schema"]]
            self._shards[entry["file"]] = storage.Shard(self.path / entry["file"], schema, entry["rows"])
        return self._shards[entry["file"]]

    def _sidecar(self, entry: dict[str, Any]) -> storage.Shard:
        if entry["file"] not in self._shards:
            self._shards[entry["file"]] = storage.Shard(
                self.path / entry["file"], storage.STATISTICS_SCHEMA, entry["rows"]
            )
        return self._shards[entry["file"]]

    def _concatenate(self, dtype: type, read: Callable[[storage.Shard], np.ndarray]) -> np.ndarray:
        arrays = [read(self._shard(number)) for number in range(len(self.shards))]
        return np.concatenate(arrays).astype(dtype) if arrays else np.zeros(0, dtype)


def _validated(records: Iterable[Record], vocab_size: int | None) -> Iterator[Record]:
    for number, record in enumerate(records):
        validate(record, vocab_size, name=f"appended record {number}")
        yield record


def _group_into_shards(records: Iterable[Record]) -> Iterator[list[Record]]:
    """Group the records into lists of at most one shard each."""
    shard: list[Record] = []
    size = 0
    for record in records:
        shard.append(record)
        size += _record_bytes(record)
        if len(shard) >= storage.SHARD_ROWS or size >= storage.SHARD_BYTES:
            yield shard
            shard, size = [], 0
    if shard:
        yield shard


def _record_bytes(record: Record) -> int:
    columns = [getattr(record, name) for name in ("tokens", "rewards", *STATISTICS)]
    texts = [text for text in (record.group, record.prompt, record.user) if text is not None]
    return (
        sum(column.nbytes for column in columns if column is not None) + sum(map(len, texts)) + len(record.tokens) // 8
    )
