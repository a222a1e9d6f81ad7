"""The JSONL log of a run, which survives a restart, and the interface of its trackers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from shiq_jax.replay.storage import write_atomically
from shiq_jax.sharding import hosts


class Tracker(Protocol):
    """A viewer that follows a log, such as TensorBoard, and shows every row exactly once."""

    def begin(self, rows: list[dict]) -> None:
        """Called with the rows of the log before a new one is written, and again after rows were dropped."""

    def write(self, row: dict) -> None:
        """Called with every new row."""

    def close(self) -> None:
        """Called once after the last row, also if there was none."""


class MetricsLog:
    """Appends one JSON object per line: `stage`, `step` and numbers.

    `rewind` drops the lines after the step that a stage resumes from, so that an interrupted run ends with the same
    file as an uninterrupted one.

    Args:
        path: the file; created with the first line.
        trackers: begin just before the first line is written, after most checks that may refuse a run.
    """

    def __init__(self, path: Path, trackers: Iterable[Tracker] = ()):
        self.path, self._trackers, self._begun = Path(path), tuple(trackers), False

    def write(self, stage: str, step: int, **values) -> None:
        """Append a line; arrays of one element become numbers."""
        row = {"stage": stage, "step": int(step)} | {name: _plain(value) for name, value in values.items()}
        self.begin()
        self._append(row)

    def begin(self) -> None:
        """Give the rows of the log to the trackers, unless they have them."""
        if not self._begun:
            # A crash may have cut the last line short. Readers keep it, because another process may be writing it.
            if self.path.exists() and not self.path.read_bytes().endswith(b"\n"):
                self._keep(lambda row: True)
            self._begun = True
            if self._trackers:
                self._begin_trackers(self.rows())

    def close(self) -> None:
        """Let the trackers finish."""
        self._close_trackers()

    def rows(self, stage: str | None = None) -> list[dict]:
        """All lines, or those of one stage."""
        # Nobody waits for a line that is written, so the writer alone knows which lines there are.
        rows = hosts.agree(self._read(), f"the lines of {self.path}")
        return [row for row in rows if stage is None or row["stage"] == stage]

    def rewind(self, stages: Iterable[str], step: int) -> None:
        """Drop the lines of `stages` whose step is larger than `step`."""
        stages = set(stages)
        self._keep(lambda row: row["stage"] not in stages or row["step"] <= step)

    @hosts.on_writer(wait=False)
    def _append(self, row: dict) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        for tracker in self._trackers:
            tracker.write(row)

    @hosts.on_writer(wait=False)
    def _begin_trackers(self, rows: list[dict]) -> None:
        for tracker in self._trackers:
            tracker.begin(rows)

    @hosts.on_writer(wait=False)
    def _close_trackers(self) -> None:
        for tracker in self._trackers:
            tracker.close()

    def _read(self) -> list[dict]:
        if not self.path.exists():
            return []
        rows = []
        for line in self.path.read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return rows

    def _keep(self, wanted) -> None:
        if hosts.agree(self.path.exists(), f"whether there is {self.path}"):
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
    """Real tokens per second in the update step, over updates that did not compile and that count their tokens."""
    counted = [row for row in rows if not row["compiled"] and "tokens" in row]
    seconds = sum(row["seconds"] for row in counted)
    return sum(row["tokens"] for row in counted) / seconds if seconds else None
