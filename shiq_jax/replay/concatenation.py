"""Concatenation of replay buffers."""

from collections.abc import Sequence
from pathlib import Path

from shiq_jax.errors import UserError
from shiq_jax.replay import storage
from shiq_jax.replay.buffer import Buffer
from shiq_jax.replay.manifest import NAME, Manifest, remove_leftovers
from shiq_jax.sharding import hosts


def concatenate(paths: Sequence[str | Path], out: str | Path) -> Buffer:
    """Create a buffer at `out` with the records of all buffers in `paths`, in order, and their statistics.

    Groups keep their names, so groups of the same name in two buffers are merged. `out` must not exist, or be an empty
    directory or an empty buffer (as an interrupted call leaves it); otherwise raises UserError.
    """
    out = Path(out)
    sources = [Buffer.open(path) for path in paths]
    target = Buffer.open(out) if (out / NAME).exists() else Buffer.create(out)
    if len(target):
        raise UserError(f"{out} is already a replay buffer with {len(target)} records; choose another directory.")
    remove_leftovers(out, set())
    merged = Manifest()
    for source in sources:
        first = len(merged.shards)
        for number, entry in enumerate(source.manifest.shards):
            name = f"records-{first + number:05d}.arrow"
            storage.copy_file(source.path / entry["file"], out / name)
            merged.shards.append({**entry, "file": name})
        for digest, statistics in source.manifest.statistics.items():
            merged_statistics = merged.statistics.setdefault(digest, {"identity": statistics["identity"], "shards": {}})
            for number, entry in statistics["shards"].items():
                copied = dict(entry)
                if entry["source"] == "file":
                    copied["file"] = f"statistics/{digest}/{first + int(number):05d}.arrow"
                    hosts.on_writer((out / copied["file"]).parent.mkdir)(parents=True, exist_ok=True)
                    storage.copy_file(source.path / entry["file"], out / copied["file"])
                merged_statistics["shards"][str(first + int(number))] = copied
    merged.save(out)
    return Buffer(out, merged)
