"""Several buffers as one."""

from collections.abc import Sequence
from pathlib import Path

from shiq_jax.errors import UserError
from shiq_jax.replay import storage
from shiq_jax.replay.buffer import Buffer
from shiq_jax.replay.manifest import NAME, Manifest, remove_leftovers
from shiq_jax.sharding import hosts


def concatenate(paths: Sequence[str | Path], out: str | Path) -> Buffer:
    """Makes a new buffer at `out` of the records of several, in order, with all their statistics; returns it.

    Groups keep their names, so equal names of two buffers become one group. Raises UserError when `out` is something
    else than a directory to be made or an empty buffer, as an interrupted call leaves it.
    """
    out = Path(out)
    sources = [Buffer.open(path) for path in paths]
    target = Buffer.open(out) if (out / NAME).exists() else Buffer.create(out)
    if len(target):
        raise UserError(f"{out} is a replay buffer with {len(target)} records already; name another directory.")
    remove_leftovers(out, set())
    merged = Manifest()
    for source in sources:
        first = len(merged.shards)
        for number, entry in enumerate(source.manifest.shards):
            name = f"records-{first + number:05d}.arrow"
            storage.copy_file(source.path / entry["file"], out / name)
            merged.shards.append({**entry, "file": name})
        for digest, made in source.manifest.statistics.items():
            into = merged.statistics.setdefault(digest, {"identity": made["identity"], "shards": {}})
            for number, entry in made["shards"].items():
                copied = dict(entry)
                if entry["source"] == "file":
                    copied["file"] = f"statistics/{digest}/{first + int(number):05d}.arrow"
                    hosts.on_writer((out / copied["file"]).parent.mkdir)(parents=True, exist_ok=True)
                    storage.copy_file(source.path / entry["file"], out / copied["file"])
                into["shards"][str(first + int(number))] = copied
    merged.save(out)
    return Buffer(out, merged)
