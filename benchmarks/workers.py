"""Processes that each hold one contestant, warmed up, and are asked for one step at a time, in turns.

A worker is a program that, once it is warm, writes a line `ready {...}` and then answers each line `step` with a line
`step {"seconds": ..., "peak_bytes": ...}`. So contestants that live in environments of their own take turns, and what
disturbs the machine disturbs them all; a worker that waits costs nothing but its memory.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class WorkerError(RuntimeError):
    """A worker ended before it answered."""


class Worker:
    """One contestant; use it as a context."""

    def __init__(self, name: str, command: Sequence[str], log: Path, env: Mapping[str, str] | None = None):
        self.name, self.log = name, log
        log.parent.mkdir(parents=True, exist_ok=True)
        self._errors = open(log, "w")
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True,
            env={**os.environ, **(env or {})},
        )  # fmt: skip

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._errors.close()

    def ready(self) -> dict[str, Any]:
        """Waits until it is warm; what it says of itself."""
        return self._answer("ready")

    def step(self) -> dict[str, Any]:
        """One step: `seconds`, and `peak_bytes`, the most memory that was resident so far."""
        self._process.stdin.write("step\n")
        self._process.stdin.flush()
        return self._answer("step")

    def _answer(self, kind: str) -> dict[str, Any]:
        for line in self._process.stdout:
            if line.startswith(kind + " "):
                return json.loads(line[len(kind) :])
            self._errors.write(line)
        tail = self.log.read_text(errors="replace").strip().splitlines()[-3:]
        raise WorkerError(f"{self.name} ended without an answer ({self.log}): {' / '.join(tail)}")


def take_turns(workers: Sequence[Worker], steps: int) -> dict[str, list[dict[str, Any]]]:
    """So many steps of every worker, one after the other, the order reversed every time."""
    found: dict[str, list[dict[str, Any]]] = {worker.name: [] for worker in workers}
    for turn in range(steps):
        for worker in workers if turn % 2 == 0 else reversed(workers):
            found[worker.name].append(worker.step())
    return found


def median(steps: Sequence[Mapping[str, float]]) -> float:
    """Median seconds of some steps."""
    return statistics.median(step["seconds"] for step in steps)
