"""Processes that each hold one contestant, warmed up, and are asked for one step at a time, in turns.

A worker is a program that, once it is warm, writes a line `ready {...}` and then answers each line `step` with a line
`step {"seconds": ..., "peak_bytes": ..., "step": ...}`, the last being which of the work's steps it was. So contestants
that live in environments of their own take turns, and what disturbs the machine disturbs them all; a worker that waits
costs nothing but its memory.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class WorkerError(RuntimeError):
    """A worker ended before it answered."""


class Worker:
    """One contestant; a context, entered when it is warm.

    Args:
        name: what to call it.
        command: what starts it.
        log: where its chatter goes.
        env: more of its environment.
        memory: bytes that it may have; a program that asks for more fails, and the machine does not suffer.

    Attributes:
        about: what it says of itself, once it is warm.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        log: Path,
        env: Mapping[str, str] | None = None,
        memory: int | None = None,
    ):
        self.name, self.log = name, log
        self._command, self._env, self._memory = command, {**os.environ, **(env or {})}, memory
        self.about: dict[str, Any] = {}

    def __enter__(self) -> Worker:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self._errors = open(self.log, "w")
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True,
            env=self._env,
        )  # fmt: skip
        if self._memory is not None:
            resource.prlimit(self._process.pid, resource.RLIMIT_DATA, (self._memory, self._memory))
        try:
            self.about = self._answer("ready")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._errors.close()

    def step(self) -> dict[str, Any]:
        """One step: `seconds`, and `peak_bytes`, the most memory that was resident so far."""
        try:
            self._process.stdin.write("step\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass
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


def seconds_per_step(steps: Sequence[Mapping[str, Any]]) -> float:
    """The mean over the work's steps of the median over the times that each was taken."""
    times = defaultdict(list)
    for step in steps:
        times[step.get("step", 0)].append(step["seconds"])
    return statistics.mean(map(statistics.median, times.values()))
