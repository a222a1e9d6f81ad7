"""Private runs: mechanism, secret, and training plan."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from shiq_jax.errors import UserError
from shiq_jax.objectives import Objective
from shiq_jax.privacy import Mechanism
from shiq_jax.privacy.secret import Secret
from shiq_jax.runs.ingest import import_public_data
from shiq_jax.runs.options import Job
from shiq_jax.runs.phases import Phase, Plan, epoch_ends
from shiq_jax.runs.private_options import Privacy
from shiq_jax.runs.public_phase import PublicData
from shiq_jax.runs.round import LearningProblem, Round, annotate
from shiq_jax.runs.run import Run
from shiq_jax.runs.run_directory import read_json, write_json
from shiq_jax.sharding import hosts
from shiq_jax.training.placement import data_parallel_size
from shiq_jax.training.private_batches import PrivateBatches, privacy_units
from shiq_jax.training.state import State
from shiq_jax.training.update import make_update

# What to restore when a field of privacy.json has changed, by field; otherwise the options.
_RESTORE = {
    "dataset_size": "data", "secret": "secret", "largest_batch": "number of devices and microbatches",
}  # fmt: skip
# Number of log lines with an epsilon.
EPSILON_POINTS = 100


class PrivateState(NamedTuple):
    """State that only private runs need."""

    mechanism: Mechanism
    secret: Secret
    options: Privacy

    @property
    def settings(self) -> dict[str, Any]:
        """Content of privacy.json: mechanism, fingerprint of the secret, and the options that void the guarantee."""
        return dataclasses.asdict(self.mechanism) | {
            "clip": repr(self.mechanism.clip), "secret": self.secret.fingerprint,
            "insecure": self.options.insecure_deterministic, "shown": self.options.log_private,
        }  # fmt: skip

    def epsilon_metrics(self, step: int) -> dict[str, float]:
        """Epsilon after `step` private updates, for the log; empty for most updates."""
        # A call of the accountant takes about a second.
        every = max(self.mechanism.steps // EPSILON_POINTS, 1)
        if step % every and step != self.mechanism.steps:
            return {}
        return {"epsilon": self.mechanism.epsilon(step)}

    def metadata(self, step: int) -> dict[str, Any]:
        """Metadata of checkpoints: epsilon so far, mechanism and fingerprint of the secret, never the secret itself."""
        return {"epsilon": self.mechanism.epsilon(step), "privacy": self.settings}

    def check(self, path: Path, metadata: Mapping[str, Any]) -> None:
        """Raise UserError for a checkpoint of another mechanism or secret."""
        _check_unchanged(path, metadata.get("privacy", self.settings), self.settings)


def private_plan(round: Round, problem: LearningProblem) -> Plan:
    """Training plan of a private run: an optional public phase, then private updates.

    Raises:
        UserError: options or data do not suit a private run, or its secret is missing.
    """
    run, job, model, objective = round.run, round.run.job, problem.model, problem.objective
    private, batches = _set_up(run, problem)
    public = None
    if job.public.data:
        buffer = import_public_data(run, model)
        references, _ = annotate(run, buffer, dict.fromkeys(problem.references, round.reference))
        public = PublicData(run, buffer, references, objective, private.mechanism)
    private_steps = batches.steps(job.epochs)
    total_steps = private_steps + (public.steps if public else 0)
    optimizer = job.optimizer.build(total_steps)
    update = make_update(
        model, objective, optimizer, mesh=run.mesh, microbatches=job.microbatches, privacy=private.mechanism,
        method=job.privacy.method, return_unit_metrics=job.privacy.log_private,
    )  # fmt: skip
    mixed = public is not None and not public.has_phase

    def private_update(state: State, batch) -> tuple[State, dict]:
        private_batch, public_kwargs = batch if mixed else (batch, {})
        return update(state, private_batch, private.secret.noise, **public_kwargs)

    phase = Phase(
        "update", private_update, public.mix_into(batches) if mixed else batches, private_steps,
        steps_per_epoch=max(batches.steps(1), 1), epoch_ends=epoch_ends(batches, job.epochs),
        metrics=private.epsilon_metrics, metadata=private.metadata,
        check=lambda metadata: private.check(round.directory.checkpoints, metadata),
    )  # fmt: skip
    public_phases = [public.phase(model, optimizer)] if public is not None and public.has_phase else []
    plan = Plan([*public_phases, phase], optimizer, job.optimizer.learning_rate_at(total_steps))
    if public is None:
        return plan
    return plan._replace(on_start=partial(public.begin, model), on_evaluation=partial(public.log_diagnostics, model))


def check_private_job(job: Job, objective: Objective) -> None:
    """Raise UserError for options that a private run does not support or whose releases epsilon does not cover."""
    if objective.couple is not None:
        raise UserError(
            f"the loss {job.loss.name} couples the examples of a batch, so per-example clipping is impossible: choose "
            "another loss for a private run"
        )
    per_layer = job.privacy.groupwise or job.privacy.method in ("ghost", "bk", "group")
    if per_layer and (objective.heads or objective.extra_stats):
        raise UserError(
            f"the loss {job.loss.name} needs heads or token statistics beyond logp and lse, which ghost, bk and group "
            "do not support: omit --privacy.method and --privacy.groupwise, or choose another loss"
        )
    if job.data is None:
        raise UserError("a private run trains on an existing dataset: set --data")
    if job.evaluation.data is None:
        raise UserError("an evaluation on private prompts would release them: set --evaluation.data to public prompts")
    if job.baseline != "none":
        raise UserError("a baseline depends on other units, which is not accounted for: omit --baseline")
    if job.seed and not job.privacy.insecure_deterministic:
        raise UserError(
            "anyone who knows the seed can subtract the noise: omit --seed, or add --privacy.insecure-deterministic in "
            "a test"
        )


def _set_up(run: Run, problem: LearningProblem) -> tuple[PrivateState, PrivateBatches]:
    """Mechanism, secret and batches of a new run, or the recorded ones of a resumed run."""
    job, options, buffer = run.job, run.job.privacy, problem.buffer
    units = privacy_units(buffer, problem.objective.unit, options.unit)
    if job.batch_size > len(units):
        raise UserError(
            f"a batch of {job.batch_size} is larger than the data of {len(units)} units: lower --batch-size"
        )
    mechanism = options.mechanism(
        problem.trainable, dataset_size=len(units), expected_batch=job.batch_size, example=problem.objective.unit,
        steps=math.ceil(round(job.epochs * len(units) / job.batch_size, 9)),
        multiple=data_parallel_size(run.mesh) * job.microbatches,
    )  # fmt: skip
    if mechanism.delta >= 1 / len(units):
        print(
            f"warning: delta {mechanism.delta:g} is not below 1 / {len(units)}, the number of units: such a delta "
            "permits publishing a random unit",
            file=sys.stderr,
        )
    private = PrivateState(mechanism, _secret(run), options)
    batches = PrivateBatches(buffer, units, mechanism, private.secret, references=problem.references, mesh=run.mesh)
    file = run.directory.privacy
    if not file.exists():
        write_json(file, private.settings | {"epsilon": mechanism.epsilon()})
    recorded = {name: value for name, value in read_json(file).items() if name != "epsilon"}
    _check_unchanged(file, recorded, private.settings)
    return private, batches


def _check_unchanged(path: Path, recorded: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Raise UserError for the first recorded setting that differs from the current ones."""
    for name, value in recorded.items():
        if value != current.get(name):
            raise UserError(
                f"{path} has {name} {value!r}, but this run has {current.get(name)!r}: restore the original "
                f"{_RESTORE.get(name, 'options')}, or start another run"
            )


def _secret(run: Run) -> Secret:
    """Create the secret of a new run, or read that of a resumed run."""
    options, path = run.job.privacy, run.job.privacy.secret or run.directory.secret
    if options.insecure_deterministic:
        return Secret.insecure(run.job.seed)
    if run.directory.privacy.exists():
        return Secret.read(path)
    if hosts.process_count() > 1:
        raise UserError("private runs on several hosts, which would have to share one secret, are not supported yet")
    if run.job.resume:
        if run.log.rows("update") or any(run.directory.checkpoints.glob("[0-9]*")):
            raise UserError(
                f"{run.directory.privacy}, the privacy account of this run, is missing: restore it, or start another "
                "run"
            )
        if path == run.directory.secret:
            # The run stopped before it wrote privacy.json, so nothing was released with this secret.
            hosts.on_writer(path.unlink)(missing_ok=True)
    return Secret.create(path)
