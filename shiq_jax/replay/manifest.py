"""The manifest of a buffer. It is written last, so files that it does not list are leftovers of interrupted writes."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shiq_jax.errors import UserError
from shiq_jax.replay.storage import RECORD_SCHEMAS, TEMPORARY, write_atomically
from shiq_jax.sharding import hosts

NAME = "manifest.json"
FORMAT = "shiq_jax.replay"
SCHEMA_VERSION = 2


def _add_shard_schemas(content: dict[str, Any]) -> dict[str, Any]:
    """Migrate version 1 to 2; version 1 shards have no columns chosen, label, rank and score, which read as None."""
    return content | {"shards": [{**entry, "schema": 1} for entry in content["shards"]]}


# Migrations of the parsed manifest from each version to the next; none of them rewrites shards.
MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {1: _add_shard_schemas}


@dataclasses.dataclass
class Manifest:
    """Contents of `manifest.json`.

    Attributes:
        shards: one entry per record shard, in order: {"file", "schema", "rows", "tokens", "actions", "bytes", "crc32"},
            where `schema` is the schema version of the shard.
        statistics: maps each identity digest to {"identity", "shards"}. `shards` maps the shard number, as a string,
            to {"source": "records"} for sampler statistics in the records themselves, or to {"source": "file", "file",
            "rows", "bytes", "crc32"}.
    """

    shards: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    statistics: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)

    def save(self, directory: Path) -> None:
        """Write the manifest to `directory` atomically."""
        content = {"format": FORMAT, "schema_version": SCHEMA_VERSION, **dataclasses.asdict(self)}
        text = json.dumps(content, indent=1, sort_keys=True)
        write_atomically(directory / NAME, lambda file: file.write(text.encode()))

    @classmethod
    def load(cls, directory: Path) -> "Manifest":
        """Read and migrate the manifest in `directory`; raises UserError if it is missing or invalid."""
        path = directory / NAME
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError) as error:
            raise UserError(
                f"{directory} is not a replay buffer: it has no {NAME}; pass the directory of a buffer."
            ) from error
        except ValueError as error:
            raise UserError(f"{path} is not valid JSON; restore the file or rebuild the buffer.") from error
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise UserError(f"{path} is not the manifest of a replay buffer; pass the directory of a buffer.")
        try:
            content = migrate(content, path)
            manifest = cls(shards=content["shards"], statistics=content["statistics"])
            for shard in manifest.shards:
                _ = [int(shard[key]) for key in ("rows", "tokens", "actions", "bytes", "crc32")], str(shard["file"])
                _ = RECORD_SCHEMAS[shard["schema"]]
            for entry in manifest.statistics.values():
                _ = dict(entry["identity"]), [shard["source"] for shard in entry["shards"].values()]
        except UserError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"{path} has a missing or invalid field: {error}; restore the file or rebuild the buffer."
            ) from error
        return manifest

    def files(self) -> set[str]:
        """All listed files, relative to the directory of the manifest."""
        return {entry["file"] for entry in [*self.shards, *self.sidecars()]}

    def sidecars(self) -> list[dict[str, Any]]:
        """The entries of all statistics that are stored in separate files."""
        entries = [entry for statistics in self.statistics.values() for entry in statistics["shards"].values()]
        return [entry for entry in entries if entry["source"] == "file"]


def is_buffer(path: str | Path) -> bool:
    """Whether `path` is the directory of a replay buffer."""
    return (Path(path) / NAME).is_file()


def migrate(content: dict[str, Any], path: Path) -> dict[str, Any]:
    """Migrate a parsed manifest to the current schema version; raises UserError if its version is not supported."""
    version = content.get("schema_version")
    while version != SCHEMA_VERSION:
        if not isinstance(version, int) or version > SCHEMA_VERSION:
            raise UserError(
                f"{path} has schema version {version!r}, but this shiq_jax reads versions up to {SCHEMA_VERSION}; "
                "upgrade shiq_jax to read this buffer."
            )
        if version not in MIGRATIONS:
            raise UserError(f"{path} has schema version {version}, which cannot be migrated; rebuild the buffer.")
        content = MIGRATIONS[version](content)
        version += 1
        content["schema_version"] = version
    return content


@hosts.on_writer
def remove_leftovers(path: Path, listed: set[str]) -> None:
    """Delete temporary files and unlisted shards, which interrupted writes leave in a buffer's directory."""
    for file in _buffer_files(path):
        if file.relative_to(path).as_posix() not in listed:
            file.unlink(missing_ok=True)


def _buffer_files(path: Path) -> list[Path]:
    patterns = ("records-*.arrow", "statistics/*/*.arrow")
    shards = [file for pattern in patterns for file in path.glob(pattern)]
    return shards + [file for pattern in (*patterns, NAME) for file in path.glob(pattern + TEMPORARY)]


def check_available(path: Path) -> None:
    """Raise UserError unless `path` does not exist or is an empty directory."""
    if (path / NAME).exists():
        raise UserError(f"{path} is already a replay buffer; open it to append, or choose another directory.")
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file; choose a directory for the replay buffer.")
    files = [file.name for file in path.glob("*") if file.name != NAME + TEMPORARY]
    if records := [name for name in files if name.startswith("records-")]:
        raise UserError(
            f"{path} contains {min(records)} of a replay buffer without its {NAME}; restore the manifest or remove the "
            "shards."
        )
    if files:
        raise UserError(
            f"{path} contains other files, such as {min(files)}; choose an empty directory for the replay buffer."
        )
