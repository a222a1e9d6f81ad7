"""Our update step and the peers' on one work: each peer's settings are tried, and then ours and theirs take turns."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

from benchmarks import works
from benchmarks.peers import TRL, TUNIX, Setting, quiet
from benchmarks.workers import Worker, WorkerError, seconds_per_step, take_turns
from benchmarks.works import Work

# Our rematerialisation policies. The goals count for `ours`, which is also the leanest.
OURS = {"ours": "full", "fastest": "dots"}

# What a peer's process may take of the machine's memory.
MEMORY = 20 * 10**9


class Contest:
    """Processes for one work.

    Args:
        work: what is trained on.
        model: a Hugging Face directory.
        runs: where the work and the logs are written.
        peers: where the peers are installed.
        tiny: the model is a tiny one, and so are prompts and answers.
    """

    def __init__(self, work: Work, model: str, runs: Path, peers: Path, tiny: bool = False):
        self.work, self._model, self._runs, self._peers = work, model, runs, peers
        self._path, self._trial = runs / f"{work.name}.json", runs / f"{work.name}-trial.json"
        works.write(work, self._path, tiny=tiny)
        works.write(work.trial, self._trial, tiny=tiny)

        found = (peer.settings(work.at_once, work.pairs) for peer in (TRL, TUNIX))
        self._settings = {str(setting): setting for several in found for setting in several}

    @property
    def as_they_come(self) -> tuple[str, ...]:
        """The settings that a peer's users get without asking, a whole step at once."""
        return tuple(
            name
            for name, setting in self._settings.items()
            if setting.mode == setting.peer.defaults and setting.at_once == self.work.pairs
        )

    def tried(self, steps: int) -> dict[str, dict]:
        """Seconds and peak memory of every setting of every peer on the smaller work; what failed has `failed` instead.

        steps: warm ones of each, whose median counts.
        """
        found = {}
        for name, setting in self._settings.items():
            try:
                with self._theirs(setting, self._trial) as worker:
                    taken = [worker.step() for _ in range(steps)]
                peak = taken[-1]["peak_bytes"]
                found[name] = {"seconds": seconds_per_step(taken), "peak_bytes": peak, "turns": taken}
            except WorkerError as error:
                found[name] = {"failed": str(error)}
            print(f"  {name}: {found[name].get('failed') or found[name]['seconds']}", file=sys.stderr)
        return found

    def measured(self, theirs: str, repeats: int) -> dict[str, dict]:
        """What ours in all settings and a peer in one found in turns: `about`, `turns`, `seconds` and `peak_bytes`.

        theirs: the peer's setting; "alone" for none.
        """
        with contextlib.ExitStack() as stack:
            workers = [stack.enter_context(self.ours(name, remat)) for name, remat in OURS.items()]
            if theirs != "alone":
                workers.append(stack.enter_context(self._theirs(self._settings[theirs], self._path)))
            turns = take_turns(workers, repeats * self.work.steps)
        return {
            worker.name: {
                "about": worker.about,
                "seconds": seconds_per_step(turns[worker.name]),
                "peak_bytes": turns[worker.name][-1]["peak_bytes"],
                "turns": turns[worker.name],
            }
            for worker in workers
        }

    def ours(self, name: str, remat: str) -> Worker:
        """Our worker, not started."""
        objective = "dpo" if self.work.answers == 2 else "shiq"
        arguments = [self._model, str(self._path), remat, objective]
        log = self._runs / "logs" / f"{self.work.name}-{remat}.log"
        return Worker(name, [sys.executable, "-m", "benchmarks.ours", *arguments], log, quiet())

    def _theirs(self, setting: Setting, work: Path) -> Worker:
        arguments = [self._model, str(work.absolute()), *setting.arguments]
        log = self._runs / "logs" / f"{work.stem}-{str(setting).replace(', ', '-').replace(' ', '_')}.log"
        return Worker("peer", setting.peer.command(self._peers, arguments), log, quiet(), MEMORY)
