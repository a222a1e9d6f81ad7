"""The JSONL log of a run, which survives a restart, and those who follow it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from shiq_jax.replay.storage import write_atomically


class Tracker(Protocol):
    """Somebody who follows a log, such as TensorBoard, and shows what it holds: no less, and nothing twice."""

    def begin(self, rows: list[dict]) -> None:
        """The log holds these rows: called before the first one is written, and again when some were dropped."""

    def write(self, row: dict) -> None:
        """A row was added."""

    def close(self) -> None:
        """Nothing more will be written; called even if nothing ever was."""


class MetricsLog:
    """Appends one JSON object per line: `stage`, `step` and numbers.

    Lines of a stage that lie behind the step from which it is resumed are dropped by `rewind`, so that the file of a
    run that was interrupted is that of a run that was not.

    Args:
        path: the file; made by the first line.
        trackers: begin when the first line is about to be written, after most of what may refuse a run.
    """

    def __init__(self, path: Path, trackers: Iterable[Tracker] = ()):
        self.path, self._trackers, self._begun = Path(path), tuple(trackers), False

    def write(self, stage: str, step: int, **values) -> None:
        """Append a line; arrays of one element become numbers."""
        row = {"stage": stage, "step": int(step)} | {name: _plain(value) for name, value in values.items()}
        self.begin()
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        for tracker in self._trackers:
            tracker.write(row)

    def begin(self) -> None:
        """Tell the trackers what the log holds, unless they know."""
        if not self._begun:
            # A line that was cut short by a crash; to who only reads it may be one that is being written.
            if self.path.exists() and not self.path.read_bytes().endswith(b"\n"):
                self._keep(lambda row: True)
            self._begun = True
            for tracker in self._trackers:
                tracker.begin(self.rows())

    def close(self) -> None:
        """Let the trackers finish."""
        for tracker in self._trackers:
            tracker.close()

    def rows(self, stage: str | None = None) -> list[dict]:
        """All lines, or those of one stage."""
        if not self.path.exists():
            return []
        rows = []
        for line in self.path.read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return [row for row in rows if stage is None or row["stage"] == stage]

    def rewind(self, stages: Iterable[str], step: int) -> None:
        """Drop the lines of `stages` whose step is larger than `step`."""
        stages = set(stages)
        self._keep(lambda row: row["stage"] not in stages or row["step"] <= step)

    def _keep(self, wanted) -> None:
        if self.path.exists():
            rows = self.rows()
            kept = [row for row in rows if wanted(row)]
            text = "".join(json.dumps(row) + "\n" for row in kept)
            write_atomically(self.path, lambda file: file.write(text.encode()))
            if self._begun and len(kept) < len(rows):
                self._begun = False
                self.begin()


def _plain(value):
    if hasattr(value, "item"):
        value = value.item()
    return value


def tokens_per_second(rows: Sequence[Mapping]) -> float | None:
    """Real tokens through the update step per second, over the updates that did not compile and say how many."""
    counted = [row for row in rows if not row["compiled"] and "tokens" in row]
    seconds = sum(row["seconds"] for row in counted)
    return sum(row["tokens"] for row in counted) / seconds if seconds else None
