"""Private runs: mechanism, secret, and the phases that learn with both."""

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
from shiq_jax.runs.ingest import public_buffer
from shiq_jax.runs.options import Job
from shiq_jax.runs.phases import Phase, Plan
from shiq_jax.runs.private_options import Privacy
from shiq_jax.runs.public_phase import PublicData
from shiq_jax.runs.round import LearningProblem, Round, annotated
from shiq_jax.runs.run import Run
from shiq_jax.runs.run_directory import read_json, write_json
from shiq_jax.sharding import hosts
from shiq_jax.training.placement import data_parallel_size
from shiq_jax.training.private_batches import PrivateBatches, privacy_units
from shiq_jax.training.state import State
from shiq_jax.training.update import make_update

# What to restore when a field of privacy.json has changed, by field.
_RESTORE = {
    "dataset_size": "the data that it was begun with", "secret": "the secret that it was begun with",
    "largest_batch": "the number of devices and microbatches that it was begun with",
}  # fmt: skip
# Number of updates whose lines in the log have an epsilon.
SHOWN = 100


class Private(NamedTuple):
    """State that only private runs need."""

    mechanism: Mechanism
    secret: Secret
    options: Privacy

    @property
    def about(self) -> dict[str, Any]:
        """Content of privacy.json: the mechanism, a fingerprint of the secret, and the options that void epsilon."""
        # Epsilon does not hold with a guessable key or with logged numbers of units.
        return dataclasses.asdict(self.mechanism) | {
            "clip": repr(self.mechanism.clip), "secret": self.secret.fingerprint,
            "insecure": self.options.insecure_deterministic, "shown": self.options.log_private,
        }  # fmt: skip

    def spent(self, done: int) -> dict[str, float]:
        """Epsilon after `done` private updates, for the log; empty where it is not logged."""
        # The accountant takes about a second per call, so epsilon is logged just often enough for a curve.
        every = max(self.mechanism.steps // SHOWN, 1)
        if done % every and done != self.mechanism.steps:
            return {}
        return {"epsilon": self.mechanism.epsilon(done)}

    def metadata(self, done: int) -> dict[str, Any]:
        """Metadata of checkpoints: epsilon so far, the mechanism and a fingerprint of the secret, never the secret."""
        return {"epsilon": self.mechanism.epsilon(done), "privacy": self.about}

    def check(self, path: Path, metadata: Mapping[str, Any]) -> None:
        """Raises UserError for a checkpoint of another mechanism or secret."""
        _same(path, metadata.get("privacy", self.about), self.about)


def private_plan(round: Round, problem: LearningProblem) -> Plan:
    """Phases of a private run: public updates first, if there are any, then private ones.

    Raises:
        UserError: options or data do not go with a private run, or its secret is gone.
    """
    run, job, model, objective = round.run, round.run.job, problem.model, problem.objective
    private, batches = _begin(run, problem)
    public = None
    if job.public.data:
        there = public_buffer(run, model)
        references, _ = annotated(run, there, dict.fromkeys(problem.references, round.reference))
        public = PublicData(run, there, references, objective, private.mechanism)
    private_steps = batches.steps(job.epochs)
    planned = private_steps + (public.steps if public else 0)
    optimizer = job.optimizer.build(planned)
    update = make_update(
        model, objective, optimizer, mesh=run.mesh, microbatches=job.microbatches, privacy=private.mechanism,
        method=job.privacy.method, return_unit_metrics=job.privacy.log_private,
    )  # fmt: skip
    mixed = public is not None and not public.first

    def private_update(state: State, batch) -> tuple[State, dict]:
        own, beside = batch if mixed else (batch, {})
        return update(state, own, private.secret.noise, **beside)

    phase = Phase(
        "update", private_update, public.mixed(batches) if mixed else batches, private_steps,
        steps_per_pass=max(batches.steps(1), 1), pass_ends=[batches.steps(n + 1) for n in range(int(job.epochs))],
        metrics=private.spent, metadata=private.metadata,
        check=lambda metadata: private.check(round.directory.checkpoints, metadata),
    )  # fmt: skip
    first = [public.phase(model, optimizer)] if public is not None and public.first else []
    plan = Plan([*first, phase], optimizer, job.optimizer.learning_rate_at(planned))
    if public is None:
        return plan
    return plan._replace(on_start=partial(public.begin, model), on_evaluation=partial(public.look, model))


def check_private_job(job: Job, objective: Objective) -> None:
    """Raises UserError for options that release what epsilon does not cover, or that a private run does not support."""
    if objective.couple is not None:
        raise UserError(
            f"the loss {job.loss.name} couples the examples of a batch, so that none can be clipped by itself: choose "
            "another for a private run"
        )
    clipped_by_operations = job.privacy.groupwise or job.privacy.method in ("ghost", "bk", "group")
    if clipped_by_operations and (objective.heads or objective.statistics):
        raise UserError(
            f"the loss {job.loss.name} reads more than log-probabilities and their normaliser, which the methods "
            "ghost, bk and group do not support: leave --privacy.method and --privacy.groupwise out, or choose another "
            "loss"
        )
    if job.data is None:
        raise UserError("a private run learns from --data and samples nothing to learn from: give --data")
    if job.evaluation.data is None:
        raise UserError(
            "an evaluation on private prompts would release them: give public prompts with --evaluation.data"
        )
    if job.baseline != "none":
        raise UserError("a baseline reads the answers of other units, which is not accounted for: leave --baseline out")
    if job.seed and not job.privacy.insecure_deterministic:
        raise UserError(
            "a seed that is known takes the noise off again: leave --seed out, or add --privacy.insecure-deterministic "
            "to a test"
        )


def _begin(run: Run, problem: LearningProblem) -> tuple[Private, PrivateBatches]:
    """Mechanism, secret and batches of a run; a resumed run has those that it began with."""
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
            f"warning: delta {mechanism.delta:g} is not below 1 / {len(units)} units of data: publishing a random unit "
            "would satisfy it too",
            file=sys.stderr,
        )
    private = Private(mechanism, _secret(run), options)
    batches = PrivateBatches(buffer, units, mechanism, private.secret, references=problem.references, mesh=run.mesh)
    file = run.directory.privacy
    if not file.exists():
        write_json(file, private.about | {"epsilon": mechanism.epsilon()})
    _same(file, {name: value for name, value in read_json(file).items() if name != "epsilon"}, private.about)
    return private, batches


def _same(path: Path, known: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    for name, there in known.items():
        if there != about.get(name):
            raise UserError(
                f"{path} accounts for {name} {there!r}, but this run would have {about.get(name)!r}: restore "
                f"{_RESTORE.get(name, 'the options that it was begun with')}, or begin another run"
            )


def _secret(run: Run) -> Secret:
    options, path = run.job.privacy, run.job.privacy.secret or run.directory.secret
    if options.insecure_deterministic:
        return Secret.insecure(run.job.seed)
    if run.directory.privacy.exists():
        return Secret.read(path)
    if hosts.process_count() > 1:
        raise UserError("a private run on several hosts needs one secret for all: this is not supported yet")
    if run.job.resume:
        if run.log.rows("update") or any(run.directory.checkpoints.glob("[0-9]*")):
            raise UserError(
                f"{run.directory.privacy} is gone, which accounts for what this run has released: restore it, or begin "
                "another run"
            )
        if path == run.directory.secret:
            # Nothing was released with it: the run stopped between the two files.
            hosts.on_writer(path.unlink)(missing_ok=True)
    return Secret.create(path)
