"""The list of what a buffer holds. It is written last, so a file that it does not name does not exist."""

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


def _name_the_schema_of_shards(content: dict[str, Any]) -> dict[str, Any]:
    """Version 1 to 2: its shards lack the columns chosen, label, rank and score, which read as None."""
    return content | {"shards": [{**entry, "schema": 1} for entry in content["shards"]]}


# From each older version to the next: a function of the parsed manifest. Files are rewritten by none of them.
MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {1: _name_the_schema_of_shards}


@dataclasses.dataclass
class Manifest:
    """Contents of `manifest.json`.

    Attributes:
        shards: one entry per record shard, in order: {"file", "schema", "rows", "tokens", "actions", "bytes", "crc32"},
            where `schema` is the schema version that wrote the shard.
        statistics: per digest {"identity", "shards"}, the latter from the shard's number as text to {"source":
            "records"} for statistics that the records carry themselves, or {"source": "file", "file", "rows",
            "bytes", "crc32"}.
    """

    shards: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    statistics: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)

    def save(self, directory: Path) -> None:
        """Replaces the directory's manifest atomically."""
        content = {"format": FORMAT, "schema_version": SCHEMA_VERSION, **dataclasses.asdict(self)}
        text = json.dumps(content, indent=1, sort_keys=True)
        write_atomically(directory / NAME, lambda file: file.write(text.encode()))

    @classmethod
    def load(cls, directory: Path) -> "Manifest":
        """Reads and migrates the directory's manifest; raises UserError when there is none that can be read."""
        path = directory / NAME
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError) as error:
            raise UserError(
                f"{directory} is not a replay buffer, for it has no {NAME}; name the directory that holds one."
            ) from error
        except ValueError as error:
            raise UserError(f"{path} is not readable as JSON; restore the file or make the buffer anew.") from error
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise UserError(f"{path} is not the manifest of a replay buffer; name the directory of one.")
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
                f"{path} lacks or garbles the field {error}; restore the file or make the buffer anew."
            ) from error
        return manifest

    def files(self) -> set[str]:
        """Every file that the manifest names, relative to its directory."""
        named = {shard["file"] for shard in self.shards}
        for entry in self.statistics.values():
            named.update(shard["file"] for shard in entry["shards"].values() if shard["source"] == "file")
        return named

    def sidecars(self) -> list[dict[str, Any]]:
        """The entries of all statistics that have files of their own."""
        entries = [entry for made in self.statistics.values() for entry in made["shards"].values()]
        return [entry for entry in entries if entry["source"] == "file"]


def is_buffer(path: str | Path) -> bool:
    """Whether a replay buffer stands at `path`."""
    return (Path(path) / NAME).is_file()


def migrate(content: dict[str, Any], path: Path) -> dict[str, Any]:
    """The manifest in today's schema; raises UserError for a version that is newer, or older than the first known one."""
    version = content.get("schema_version")
    while version != SCHEMA_VERSION:
        if not isinstance(version, int) or version > SCHEMA_VERSION:
            raise UserError(
                f"{path} has schema version {version!r}, this shiq_jax reads versions up to {SCHEMA_VERSION}; "
                "upgrade shiq_jax to read this buffer."
            )
        if version not in MIGRATIONS:
            raise UserError(
                f"{path} has schema version {version}, from which there is no migration; make the buffer anew."
            )
        content = MIGRATIONS[version](content)
        version += 1
        content["schema_version"] = version
    return content


@hosts.on_writer
def remove_leftovers(path: Path, listed: set[str]) -> None:
    """Deletes what an interrupted write left in a buffer's directory: temporaries and shards that are not `listed`."""
    for file in _own_files(path):
        if file.relative_to(path).as_posix() not in listed:
            file.unlink(missing_ok=True)


def _own_files(path: Path) -> list[Path]:
    patterns = ("records-*.arrow", "statistics/*/*.arrow")
    found = [file for pattern in patterns for file in path.glob(pattern)]
    return found + [file for pattern in (*patterns, NAME) for file in path.glob(pattern + TEMPORARY)]


def check_vacant(path: Path) -> None:
    """Raises UserError unless a new buffer can be made at `path`: a directory that is empty or not there."""
    if (path / NAME).exists():
        raise UserError(f"{path} is a replay buffer already; open it to append, or name another directory.")
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file; name a directory for the replay buffer.")
    foreign = [file.name for file in path.glob("*") if file.name != NAME + TEMPORARY]
    if records := [name for name in foreign if name.startswith("records-")]:
        raise UserError(
            f"{path} holds {min(records)} of a replay buffer that lost its {NAME}; restore it, or remove both."
        )
    if foreign:
        raise UserError(
            f"{path} holds other files, such as {min(foreign)}; name an empty directory for the replay buffer."
        )
