"""The replay buffer: a directory of Arrow shards that only ever grows, read through memory maps.

    buffer/
      manifest.json                     what the buffer holds; replaced last, so a crash leaves the buffer as it was
      records-00000.arrow               one append makes one shard or several
      statistics/<digest>/00000.arrow   statistics of some model, aligned with the record shard of the same number

One process writes at a time; any number may read, each seeing what the manifest held when it opened the buffer.
"""

import bisect
import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64

from shiq_jax.errors import UserError
from shiq_jax.replay import report, storage
from shiq_jax.replay.manifest import SCHEMA_VERSION, Manifest, check_vacant, remove_leftovers
from shiq_jax.replay.records import JUDGEMENTS, STATISTICS, Record, validate
from shiq_jax.replay.stored_statistics import Identity, StoredStatistics, absent, check_annotations
from shiq_jax.sharding import hosts

_COLUMNS = tuple(field.name for field in storage.RECORDS)
_SCALARS = ("group", "prompt", "user", *JUDGEMENTS)


class Buffer:
    """A replay buffer on disk; make one with `Buffer.create(path)` or `Buffer.open(path)`.

    `len(buffer)` counts records, `buffer[i]` is the `i`-th Record, its arrays being read-only views of the file.
    """

    def __init__(self, path: Path, manifest: Manifest):
        self.path = path
        self.manifest = manifest
        self._shards: dict[str, storage.Shard] = {}
        self._starts: list[int] = []
        self._index()

    @classmethod
    def create(cls, path: str | Path) -> "Buffer":
        """Makes an empty buffer; raises UserError when `path` is a buffer already or holds other files."""
        path = Path(path)
        check_vacant(path)
        hosts.on_writer(path.mkdir)(parents=True, exist_ok=True)
        manifest = Manifest()
        manifest.save(path)
        return cls(path, manifest)

    @classmethod
    def open(cls, path: str | Path) -> "Buffer":
        """Opens an existing buffer; raises UserError when it is none, or a file is missing or changed in size."""
        path = Path(path)
        manifest = Manifest.load(path)
        for entry in [*manifest.shards, *manifest.sidecars()]:
            file = path / entry["file"]
            found = file.stat().st_size if file.exists() else None
            if found != entry["bytes"]:
                state = "is missing" if found is None else f"has {found} bytes"
                raise UserError(
                    f"{file} {state}, the manifest says {entry['bytes']} bytes; restore the file or make the buffer "
                    "anew."
                )
        return cls(path, manifest)

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> Record:
        number, row = self._locate(index)
        shard = self._shard(number)
        lists = {name: shard.get(name, row) for name in ("tokens", "action_mask", "rewards", *STATISTICS)}
        return Record(**lists, **{name: shard.value(name, row) for name in _SCALARS})

    def read(self, indices: Sequence[int]) -> list[Record]:
        """The records of these numbers, in this order; raises IndexError for a number that the buffer does not have."""
        return [self[int(index)] for index in indices]

    # ---- growing ----

    def append(self, records: Iterable[Record], *, vocab_size: int | None = None, check: bool = True) -> int:
        """Adds all the records, or none when one of them is refused or the process dies; returns how many were added.

        Args:
            records: consumed one shard at a time.
            vocab_size: when given, token ids must lie below it.
            check: whether to `validate` the records; False when whoever made them has done so.
        """
        self._begin_writing()
        made: list[dict[str, Any]] = []
        try:
            for part in _parts(_validated(records, vocab_size) if check else records):
                made.append(self._write_records(len(self.manifest.shards) + len(made), part))
        except BaseException:
            hosts.on_writer(remove_leftovers, wait=False)(self.path, self.manifest.files())
            raise
        if made:
            self._commit(Manifest(self.manifest.shards + made, self.manifest.statistics))
        return sum(entry["rows"] for entry in made)

    def _write_records(self, number: int, records: list[Record]) -> dict[str, Any]:
        name = f"records-{number:05d}.arrow"
        columns = {column: [getattr(record, column) for record in records] for column in _COLUMNS}
        written = storage.write_shard(self.path / name, storage.RECORDS, columns)
        tokens, actions = sum(len(r.tokens) for r in records), sum(len(r.rewards) for r in records)
        return {"file": name, "schema": SCHEMA_VERSION, "tokens": tokens, "actions": actions, **written}

    def _begin_writing(self) -> None:
        if Manifest.load(self.path) != self.manifest:
            raise UserError(
                f"{self.path} was changed by another process since it was opened; open it again before writing to it."
            )
        remove_leftovers(self.path, self.manifest.files())

    def _commit(self, manifest: Manifest) -> None:
        manifest.save(self.path)
        self.manifest = manifest
        self._index()

    # ---- what is in it ----

    @property
    def shards(self) -> list[range]:
        """For each record shard the numbers of its records."""
        return [range(start, end) for start, end in itertools.pairwise(self._starts)]

    @property
    def bytes(self) -> int:
        """Bytes of all shards, statistics included."""
        return sum(entry["bytes"] for entry in [*self.manifest.shards, *self.manifest.sidecars()])

    def record_files(self) -> list[Path]:
        """The record shards, in order; `datasets.Dataset.from_file` opens each."""
        return [self.path / entry["file"] for entry in self.manifest.shards]

    def group_ids(self) -> list[str]:
        """The group of every record, in record order."""
        return self.column("group")

    def user_ids(self) -> list[str | None]:
        """The user of every record, in record order."""
        return self.column("user")

    def column(self, name: str) -> list:
        """One of group, prompt, user, chosen, label, rank and score, of every record; None where it says nothing."""
        if name not in _SCALARS:
            raise ValueError(f"column is {name!r}; choose one of {', '.join(_SCALARS)}.")
        return [value for number in range(len(self.shards)) for value in self._shard(number).values(name)]

    def lengths(self) -> Int64[np.ndarray, " records"]:
        """Tokens of every record."""
        return self._gathered(np.int64, lambda shard: shard.lengths("tokens"))

    def actions(self) -> Int64[np.ndarray, " records"]:
        """Actions of every record."""
        return self._gathered(np.int64, lambda shard: shard.lengths("rewards"))

    def returns(self) -> Float64[np.ndarray, " records"]:
        """Undiscounted sum of the rewards of every record."""
        return self._gathered(np.float64, lambda shard: shard.sums("rewards"))

    def coverage(self) -> dict[str, int]:
        """How many records carry each of the optional columns."""
        names = (*STATISTICS, "prompt", "user", *JUDGEMENTS)
        return {name: sum(self._shard(number).present(name) for number in range(len(self.shards))) for name in names}

    def describe(self) -> dict[str, Any]:
        """Counts, quantiles, identities and a sample as plain JSON values; see `shiq_jax.replay.report`."""
        return report.describe(self)

    def report(self) -> str:
        """`describe` as text for people, after the bytes of every file have been held against their checksums."""
        self.verify()
        return report.render(self.describe())

    def verify(self) -> None:
        """Reads every byte; raises UserError naming the first file whose checksum is not the manifest's."""
        for entry in [*self.manifest.shards, *self.manifest.sidecars()]:
            if storage.checksum(self.path / entry["file"]) != entry["crc32"]:
                raise UserError(
                    f"{self.path / entry['file']} is corrupt: its checksum is not the manifest's; restore the file."
                )

    # ---- statistics ----

    def identities(self) -> list[tuple[Identity, list[int]]]:
        """Every identity that made statistics here, with the numbers of the shards that it covers."""
        entries = self.manifest.statistics.values()
        return [(Identity(entry["identity"]), sorted(int(number) for number in entry["shards"])) for entry in entries]

    def missing_statistics(self, identity: Identity) -> list[int]:
        """Numbers of the shards that have no statistics of this identity yet."""
        covered = self._covered(identity)
        return [number for number in range(len(self.shards)) if str(number) not in covered]

    def write_statistics(self, identity: Identity, shard: int, values: Sequence[tuple[np.ndarray, np.ndarray]]) -> None:
        """Stores the statistics of one whole shard: (logp float[A], lse float[A]), in nats, per record of its range.

        Each call is atomic, so an interrupted annotation goes on with `missing_statistics`. Raises UserError when the
        values do not fit the records.
        """
        if not 0 <= shard < len(self.shards):
            raise UserError(f"{self.path} has {len(self.shards)} shards, statistics were given for shard {shard}.")
        if shard not in self.missing_statistics(identity):
            raise UserError(f"{self.path} has the statistics of shard {shard} made by {identity} already.")
        check_annotations(values, self._shard(shard).lengths("rewards"), self._starts[shard])
        self._begin_writing()
        name = f"statistics/{Identity(identity).digest}/{shard:05d}.arrow"
        for directory in (self.path / "statistics", (self.path / name).parent):
            hosts.on_writer(directory.mkdir)(exist_ok=True)
            storage.sync_directory(directory.parent)
        logp, lse = ([np.asarray(pair[k], np.float32) for pair in values] for k in (0, 1))
        written = storage.write_shard(self.path / name, storage.ANNOTATIONS, {"logp": logp, "lse": lse})
        self._cover(identity, {str(shard): {"source": "file", "file": name, **written}})

    def adopt_sampler_statistics(self, identity: Identity) -> None:
        """Declares that the records' own (logp, lse) are this identity's, in every shard that has none of it.

        Nothing is copied. Raises UserError when a record of such a shard lacks them.
        """
        missing = self.missing_statistics(identity)
        for number in missing:
            shard = self._shard(number)
            for row in range(shard.rows if shard.present("lse") < shard.rows else 0):
                if shard.get("lse", row) is None:
                    raise UserError(
                        f"{self.path}: record {self._starts[number] + row} carries no lse of its sampler, so the "
                        "sampler's statistics cannot serve as a reference; annotate the buffer with the reference."
                    )
        if missing:
            self._begin_writing()
            self._cover(identity, {str(number): {"source": "records"} for number in missing})

    def statistics(self, identity: Identity) -> StoredStatistics:
        """The statistics of this identity for all records; raises UserError when some or all are missing."""
        identity = Identity(identity)
        covered = self._covered(identity)
        if not covered and len(self):
            raise absent(self, identity, self.manifest.statistics)
        if missing := self.missing_statistics(identity):
            raise UserError(
                f"{self.path} has statistics made by {identity} for {len(self.shards) - len(missing)} of "
                f"{len(self.shards)} shards; finish the annotation with that model."
            )

        def get(index: int) -> tuple[np.ndarray, np.ndarray]:
            number, row = self._locate(index)
            entry = covered[str(number)]
            shard = self._shard(number) if entry["source"] == "records" else self._sidecar(entry)
            return shard.get("logp", row), shard.get("lse", row)

        return StoredStatistics(identity, len(self), get)

    def _cover(self, identity: Identity, shards: dict[str, dict[str, Any]]) -> None:
        statistics = dict(self.manifest.statistics)
        statistics[Identity(identity).digest] = {
            "identity": dict(identity),
            "shards": {**self._covered(identity), **shards},
        }
        self._commit(Manifest(self.manifest.shards, statistics))

    def _covered(self, identity: Identity) -> dict[str, dict[str, Any]]:
        return self.manifest.statistics.get(Identity(identity).digest, {}).get("shards", {})

    # ---- inside ----

    def _index(self) -> None:
        self._starts = [0, *np.cumsum([shard["rows"] for shard in self.manifest.shards], dtype=np.int64).tolist()]

    def _locate(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} was asked of {self.path}, which has {len(self)}.")
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
            self._shards[entry["file"]] = storage.Shard(self.path / entry["file"], storage.ANNOTATIONS, entry["rows"])
        return self._shards[entry["file"]]

    def _gathered(self, dtype: type, read) -> np.ndarray:
        parts = [read(self._shard(number)) for number in range(len(self.shards))]
        return np.concatenate(parts).astype(dtype) if parts else np.zeros(0, dtype)


def _validated(records: Iterable[Record], vocab_size: int | None) -> Iterator[Record]:
    for number, record in enumerate(records):
        validate(record, vocab_size, name=f"record {number} of those appended")
        yield record


def _parts(records: Iterable[Record]) -> Iterator[list[Record]]:
    """The records in lists of a shard's size."""
    part: list[Record] = []
    size = 0
    for record in records:
        part.append(record)
        size += _record_bytes(record)
        if len(part) >= storage.SHARD_ROWS or size >= storage.SHARD_BYTES:
            yield part
            part, size = [], 0
    if part:
        yield part


def _record_bytes(record: Record) -> int:
    columns = [getattr(record, name) for name in ("tokens", "rewards", *STATISTICS)]
    texts = [text for text in (record.group, record.prompt, record.user) if text is not None]
    return (
        sum(column.nbytes for column in columns if column is not None) + sum(map(len, texts)) + len(record.tokens) // 8
    )
