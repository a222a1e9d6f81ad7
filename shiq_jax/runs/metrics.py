"""The JSONL metrics log of a run, which can be rewound on resume, and the interface of its trackers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from shiq_jax.replay.storage import write_atomically
from shiq_jax.sharding import hosts


class Tracker(Protocol):
    """A consumer of a log, such as TensorBoard, that receives every row exactly once."""

    def begin(self, rows: list[dict]) -> None:
        """Called with all rows of the log before the first new one, and again after rows were dropped."""

    def write(self, row: dict) -> None:
        """Called with every new row."""

    def close(self) -> None:
        """Called once at the end, even if no row was written."""


class MetricsLog:
    """Append-only log with one JSON object per line: `stage`, `step` and metrics.

    `rewind` drops the lines after the step that a stage resumes from, so that an interrupted run ends with the same
    file as an uninterrupted one.

    Args:
        path: the file; created with the first line.
        trackers: started just before the first line is written, after most checks of user input.
    """

    def __init__(self, path: Path, trackers: Iterable[Tracker] = ()):
        self.path, self._trackers, self._started = Path(path), tuple(trackers), False

    def write(self, stage: str, step: int, **values) -> None:
        """Append a line; arrays of one element become numbers."""
        row = {"stage": stage, "step": int(step)} | {name: _to_python(value) for name, value in values.items()}
        self.begin()
        self._append(row)

    def begin(self) -> None:
        """Start the trackers with the rows of the log; does nothing once they are started."""
        if not self._started:
            # Drop a line that a crash truncated. Readers must not: another process may still be writing it.
            if self.path.exists() and not self.path.read_bytes().endswith(b"\n"):
                self._filter(lambda row: True)
            self._started = True
            if self._trackers:
                self._begin_trackers(self.rows())

    def close(self) -> None:
        """Close the trackers."""
        self._close_trackers()

    def rows(self, stage: str | None = None) -> list[dict]:
        """All lines, or those of one stage."""
        # Writes do not synchronize the hosts, so the writer's view is broadcast.
        rows = hosts.agree(self._read(), f"the lines of {self.path}")
        return [row for row in rows if stage is None or row["stage"] == stage]

    def rewind(self, stages: Iterable[str], step: int) -> None:
        """Drop the lines of `stages` after `step`."""
        stages = set(stages)
        self._filter(lambda row: row["stage"] not in stages or row["step"] <= step)

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

    def _filter(self, predicate: Callable[[dict], bool]) -> None:
        """Rewrite the file with the rows that satisfy a predicate."""
        if hosts.agree(self.path.exists(), f"whether {self.path} exists"):
            rows = self.rows()
            kept = [row for row in rows if predicate(row)]
            text = "".join(json.dumps(row) + "\n" for row in kept)
            write_atomically(self.path, lambda file: file.write(text.encode()))
            if self._started and len(kept) < len(rows):
                self._started = False
                self.begin()


def _to_python(value):
    """A scalar of numpy or JAX as a Python number."""
    if hasattr(value, "item"):
        value = value.item()
    return value


def tokens_per_second(rows: Sequence[Mapping]) -> float | None:
    """Real tokens per second in the update step; updates that compiled or have no token count are excluded."""
    timed = [row for row in rows if not row["compiled"] and "tokens" in row]
    seconds = sum(row["seconds"] for row in timed)
    return sum(row["tokens"] for row in timed) / seconds if seconds else None
