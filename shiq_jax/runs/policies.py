"""Resolution of a policy name: a model, a run, a round, or a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from shiq_jax.runs.run_directory import RoundDirectory, RunDirectory


class PolicySource(NamedTuple):
    """Location of a policy.

    Attributes:
        base: directory or hub id of the model, or of the initial policy that the checkpoints belong to.
        run: the run of the checkpoints; None for a model.
        checkpoints: directory of the checkpoints; None for a model.
        step: step of the checkpoint; None for the newest.
    """

    base: str | Path
    run: RunDirectory | None = None
    checkpoints: Path | None = None
    step: int | None = None


def resolve_policy(name: str) -> PolicySource:
    """Resolve a policy name; a name that is no run, round or checkpoint is treated as a model."""
    path, step = Path(name), None
    if path.parent.name == "checkpoints" and path.name.isdigit():
        path, step = path.parent, int(path.name)
    if path.name == "checkpoints":
        path = path.parent
    run = RunDirectory(path.parent.parent if path.parent.name == "rounds" else path)
    if not run.task.exists():
        return PolicySource(name)
    rounds: list[RoundDirectory] = [round for round in run.started_rounds() if path in (run.path, round.path)]
    for round in reversed(rounds):
        if round.checkpoints.is_dir():
            return PolicySource(run.initial_policy(round), run, round.checkpoints, step)
    return PolicySource(name)
