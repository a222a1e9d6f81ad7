"""Time update steps of this library and of its peers on one workload.

Peer settings are first timed alone on a small workload; the fastest are then interleaved with this library.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

from benchmarks import workloads
from benchmarks.peers import TRL, TUNIX, Setting, worker_environment
from benchmarks.workers import Worker, WorkerError, run_interleaved, seconds_per_step
from benchmarks.workloads import Workload

# Rematerialization policy by setting of this library; goals apply to `ours`, which also uses the least memory.
OURS = {"ours": "full", "fastest": "dots"}

PEER_MEMORY_LIMIT = 20 * 10**9


class Comparison:
    """Worker processes of this library and its peers for one workload.

    Args:
        workload: training data of the steps.
        model: a Hugging Face directory.
        runs: directory for the workload files and logs.
        peers: directory of the peers' virtual environments.
        tiny: use a tiny model with short prompts and completions.
    """

    def __init__(self, workload: Workload, model: str, runs: Path, peers: Path, tiny: bool = False):
        self.workload, self._model, self._runs, self._peers = workload, model, runs, peers
        self._path, self._trial_path = runs / f"{workload.name}.json", runs / f"{workload.name}-trial.json"
        workloads.write(workload, self._path, tiny=tiny)
        workloads.write(workload.trial, self._trial_path, tiny=tiny)

        settings = (peer.settings(workload.microbatch_sizes, workload.pairs) for peer in (TRL, TUNIX))
        self._settings = {str(setting): setting for peer_settings in settings for setting in peer_settings}

    @property
    def default_settings(self) -> tuple[str, ...]:
        """Names of the peers' default settings, which process a whole step as one batch."""
        return tuple(
            name
            for name, setting in self._settings.items()
            if setting.mode == setting.peer.defaults and setting.microbatch_size == self.workload.pairs
        )

    def time_peer_settings(self, steps: int) -> dict[str, dict]:
        """Seconds and peak memory of every peer setting on the trial workload; failed settings have `failed` instead.

        Args:
            steps: timed steps per setting, after warm-up; the median is reported.
        """
        results = {}
        for name, setting in self._settings.items():
            try:
                with self._peer_worker(setting, self._trial_path) as worker:
                    timings = [worker.step() for _ in range(steps)]
                peak = timings[-1]["peak_bytes"]
                results[name] = {"seconds": seconds_per_step(timings), "peak_bytes": peak, "turns": timings}
            except WorkerError as error:
                results[name] = {"failed": str(error)}
            print(f"  {name}: {results[name].get('failed') or results[name]['seconds']}", file=sys.stderr)
        return results

    def compare(self, peer_setting: str, repeats: int) -> dict[str, dict]:
        """Time all settings of this library and one of a peer, interleaved.

        Args:
            peer_setting: name of the peer's setting, or "alone" to time this library only.
            repeats: timings per step of the workload.

        Returns:
            `about`, `turns`, `seconds` and `peak_bytes` by worker.
        """
        with contextlib.ExitStack() as stack:
            workers = [stack.enter_context(self.own_worker(name, remat)) for name, remat in OURS.items()]
            if peer_setting != "alone":
                workers.append(stack.enter_context(self._peer_worker(self._settings[peer_setting], self._path)))
            timings = run_interleaved(workers, repeats * self.workload.steps)
        return {
            worker.name: {
                "about": worker.info,
                "seconds": seconds_per_step(timings[worker.name]),
                "peak_bytes": timings[worker.name][-1]["peak_bytes"],
                "turns": timings[worker.name],
            }
            for worker in workers
        }

    def own_worker(self, name: str, remat: str) -> Worker:
        """A worker of this library, not started yet."""
        objective = "dpo" if self.workload.answers == 2 else "shiq"
        arguments = [self._model, str(self._path), remat, objective]
        log = self._runs / "logs" / f"{self.workload.name}-{remat}.log"
        return Worker(name, [sys.executable, "-m", "benchmarks.ours", *arguments], log, worker_environment())

    def _peer_worker(self, setting: Setting, path: Path) -> Worker:
        arguments = [self._model, str(path.absolute()), *setting.arguments]
        log = self._runs / "logs" / f"{path.stem}-{str(setting).replace(', ', '-').replace(' ', '_')}.log"
        command = setting.peer.command(self._peers, arguments)
        return Worker("peer", command, log, worker_environment(), PEER_MEMORY_LIMIT)
