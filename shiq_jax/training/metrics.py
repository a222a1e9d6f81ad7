"""What a run says while it works: a JSONL log that survives a restart, and progress with rates."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from shiq_jax.replay.storage import write_atomically


class MetricsLog:
    """Appends one JSON object per line: `stage`, `step` and numbers.

    Lines of a stage that lie behind the step from which it is resumed are dropped by `rewind`, so that the file of a
    run that was interrupted is that of a run that was not.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        if self.path.exists() and not self.path.read_bytes().endswith(b"\n"):
            # A line that was cut short by a crash.
            self._keep(lambda row: True)

    def write(self, stage: str, step: int, **values) -> None:
        """Append a line; arrays of one element become numbers."""
        row = {"stage": stage, "step": int(step)} | {name: _plain(value) for name, value in values.items()}
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")

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
            text = "".join(json.dumps(row) + "\n" for row in self.rows() if wanted(row))
            write_atomically(self.path, lambda file: file.write(text.encode()))


def _plain(value):
    if hasattr(value, "item"):
        value = value.item()
    return value


def track(items: Iterable, what: str, total: int, unit: str = "it") -> Iterator:
    """Pass the items on and show how far they are and how fast: a bar on a terminal, else a line every ten seconds."""
    if sys.stderr.isatty():
        yield from _bar(items, what, total, unit)
        return
    start = last = time.monotonic()
    done = 0
    for done, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - last > 10 or done == total:
            last = now
            print(
                f"{what}: {done}/{total} {unit}, {done / max(now - start, 1e-9):.2f} {unit}/s",
                file=sys.stderr,
                flush=True,
            )


def _bar(items, what, total, unit):
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
    start = time.monotonic()
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        task = progress.add_task(what, total=total, rate="")
        for done, item in enumerate(items, 1):
            yield item
            progress.update(task, completed=done, rate=f"{done / max(time.monotonic() - start, 1e-9):.2f} {unit}/s")
