"""Worker processes that run benchmark steps on request, so that programs in different environments can be interleaved.

After warm-up a worker prints a line `ready {...}`. It then responds to each line `step` with a line
`step {"seconds": ..., "peak_bytes": ..., "step": ...}`, where `step` is the index within the workload. Interleaving
exposes all workers to the same disturbances of the machine; an idle worker costs only its memory.
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
    """A worker exited before it responded."""


class Worker:
    """A worker process; a context manager that is entered once the worker is warm.

    Args:
        name: name of the worker in results and errors.
        command: command line of the program.
        log: file for its standard error and unrelated output.
        env: additional environment variables.
        memory: limit of its data segment in bytes; larger allocations fail.

    Attributes:
        info: properties that the worker reported when it became ready.
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
        self.info: dict[str, Any] = {}

    def __enter__(self) -> Worker:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self._log_file = open(self.log, "w")
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log_file, text=True,
            env=self._env,
        )  # fmt: skip
        if self._memory is not None:
            resource.prlimit(self._process.pid, resource.RLIMIT_DATA, (self._memory, self._memory))
        try:
            self.info = self._response("ready")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._log_file.close()

    def step(self) -> dict[str, Any]:
        """Run one step; returns its `seconds` and the `peak_bytes` of resident memory so far."""
        try:
            self._process.stdin.write("step\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass
        return self._response("step")

    def _response(self, kind: str) -> dict[str, Any]:
        for line in self._process.stdout:
            if line.startswith(kind + " "):
                return json.loads(line[len(kind) :])
            self._log_file.write(line)
        tail = self.log.read_text(errors="replace").strip().splitlines()[-3:]
        raise WorkerError(f"worker {self.name} exited without a response (log: {self.log}): {' / '.join(tail)}")


def run_interleaved(workers: Sequence[Worker], steps: int) -> dict[str, list[dict[str, Any]]]:
    """Run `steps` steps of every worker, alternating between them and reversing the order every round."""
    results: dict[str, list[dict[str, Any]]] = {worker.name: [] for worker in workers}
    for iteration in range(steps):
        for worker in workers if iteration % 2 == 0 else reversed(workers):
            results[worker.name].append(worker.step())
    return results


def seconds_per_step(steps: Sequence[Mapping[str, Any]]) -> float:
    """Mean over the workload's steps of the median time of each step."""
    times = defaultdict(list)
    for step in steps:
        times[step.get("step", 0)].append(step["seconds"])
    return statistics.mean(map(statistics.median, times.values()))
