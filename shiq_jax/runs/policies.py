"""Finding the policy that a command line names: a model, a run, a round, its checkpoints or one of them."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from shiq_jax.runs.run_directory import RoundDirectory, RunDirectory


class PolicySource(NamedTuple):
    """Where a policy is.

    Attributes:
        base: directory or hub id of the weights that it started from, or of the policy itself.
        run: the run whose checkpoints it is in; None for a model.
        checkpoints: their directory; None for a model.
        step: which checkpoint; None for the newest.
    """

    base: str | Path
    run: RunDirectory | None = None
    checkpoints: Path | None = None
    step: int | None = None


def find_policy(name: str) -> PolicySource:
    """Resolve a name; whatever is neither a run nor a part of one is taken for a model."""
    path, step = Path(name), None
    if path.parent.name == "checkpoints" and path.name.isdigit():
        path, step = path.parent, int(path.name)
    if path.name == "checkpoints":
        path = path.parent
    run = RunDirectory(path.parent.parent if path.parent.name == "rounds" else path)
    if not run.task.exists():
        return PolicySource(name)
    rounds: list[RoundDirectory] = [each for each in run.begun_rounds() if path in (run.path, each.path)]
    for round in reversed(rounds):
        if round.checkpoints.is_dir():
            return PolicySource(run.start_of(round), run, round.checkpoints, step)
    return PolicySource(name)
