"""The directory of a run: one place that knows the name of every file in it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from shiq_jax.errors import Refusal
from shiq_jax.replay.storage import write_atomically


class RunDirectory:
    """Paths of a run, and the rule under which a run may begin or go on in a directory."""

    def __init__(self, path: Path):
        self.path = Path(path)
        self.config = self.path / "config.json"
        self.task = self.path / "task.json"
        self.model = self.path / "model"
        self.data = self.path / "data"
        self.warm_start = self.path / "warm_start"
        self.reference = self.path / "reference"
        self.buffer = self.path / "buffer"
        self.checkpoints = self.path / "checkpoints"
        self.metrics = self.path / "metrics.jsonl"
        self.samples = self.path / "samples"
        self.curve = self.path / "learning_curve.png"
        self.summary = self.path / "summary.json"
        self.export = self.path / "export"

    @classmethod
    def begin(cls, path: Path, settings: dict[str, Any], *, resume: bool) -> RunDirectory:
        """A new run in an empty or missing directory, or the one that is there, of the same settings, with `resume`.

        Raises:
            Refusal: the directory holds a run and `resume` is not asked for, holds none and it is, holds other files,
                or holds a run of other settings.
        """
        run = cls(path)
        settings = json.loads(json.dumps(settings, default=str))
        if not resume:
            if run.config.exists():
                raise Refusal(
                    f"{path} holds a run already: add --resume to go on with it, or name another --output-dir"
                )
            if run.path.exists() and (not run.path.is_dir() or any(run.path.iterdir())):
                raise Refusal(f"{path} is not empty and holds no run: name another --output-dir")
            run.path.mkdir(parents=True, exist_ok=True)
            write_json(run.config, settings)
            return run
        if not run.config.exists():
            raise Refusal(f"{path} holds no run to resume (it has no config.json): leave --resume out to begin one")
        try:
            known = json.loads(run.config.read_text())
        except ValueError as error:
            raise Refusal(f"{run.config} is not readable as JSON: restore it, or begin another run") from error
        if not isinstance(known, dict):
            raise Refusal(f"{run.config} is not a JSON object of settings: restore it, or begin another run")
        for name, there, here in _differences(known, settings):
            raise Refusal(f"{path} was begun with {name}={there!r}, not {here!r}: resume it with its own options")
        return run

    def discard(self, *, samples: bool) -> None:
        """Take a run that was refused before it learned anything off the disk again, so that the command can be mended.

        Args:
            samples: whether the buffer's records are worth keeping; with such records the run stays.
        """
        if not self.metrics.exists() and not (samples and any(self.buffer.glob("records-*.arrow"))):
            shutil.rmtree(self.path, ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    """Replace a file by indented JSON, or leave it as it was."""
    text = json.dumps(value, indent=2) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def write_jsonl(path: Path, rows: list[dict]) -> None:
    """Replace a file by one JSON object per line, or leave it as it was."""
    text = "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
    write_atomically(path, lambda file: file.write(text.encode()))


def _differences(known: dict, wanted: dict, prefix: str = ""):
    for name in sorted(set(known) | set(wanted)):
        there, here = known.get(name), wanted.get(name)
        if isinstance(there, dict) and isinstance(here, dict):
            yield from _differences(there, here, f"{prefix}{name}.")
        elif there != here:
            yield prefix + name, there, here
