"""What a private run has beside another: its mechanism, its secret, and batches and updates that go with both."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from shiq_jax.errors import Refusal
from shiq_jax.objectives import Objective
from shiq_jax.privacy import Mechanism
from shiq_jax.privacy.secret import Secret
from shiq_jax.replay import Buffer, References
from shiq_jax.training.batches import Ahead
from shiq_jax.runs.options import Job
from shiq_jax.training.placement import data_devices
from shiq_jax.training.private_batches import PrivateBatches, units_of
from shiq_jax.runs.private_options import Privacy
from shiq_jax.runs.public_phase import PublicData
from shiq_jax.runs.run import Run
from shiq_jax.runs.run_directory import read_json, write_json
from shiq_jax.training.state import State
from shiq_jax.training.update import make_update

# By name of what a private run writes down of itself: what to restore where it has changed.
_RESTORE = {
    "dataset_size": "the data that it was begun with", "secret": "the secret that it was begun with",
    "largest_batch": "the number of devices and microbatches that it was begun with",
}  # fmt: skip
# In how many of the updates the log says what has been spent.
SHOWN = 100


class Private(NamedTuple):
    """The parts of a private run."""

    mechanism: Mechanism
    secret: Secret
    batches: Ahead
    options: Privacy
    public: PublicData | None = None

    @property
    def before(self) -> int:
        """Public updates before the first private one."""
        return self.public.taken if self.public else 0

    def beside(self, public: PublicData) -> Private:
        """The parts of a run that also learns from public data."""
        return self._replace(public=public, batches=public.mixed(self.batches))

    def make_update(self, model, objective: Objective, rule, **others) -> Callable[[State, Any], tuple[State, dict]]:
        """A private update as the passes call it, which also says what has been spent."""
        update = make_update(
            model, objective, rule, privacy=self.mechanism, method=self.options.method,
            reveal=self.options.log_private, **others,
        )  # fmt: skip

        # An accountant takes a second: often enough to draw a curve.
        every = max(self.mechanism.steps // SHOWN, 1)

        def step(state: State, batch) -> tuple[State, dict]:
            done, more = int(state.step) + 1 - self.before, {}
            if self.public and not self.public.first:
                batch, beside = batch
                more = {"public": beside, "public_weight": self.public.weight(done - 1)}
            state, metrics = update(state, batch, self.secret.noise, **more)
            # One number of what belongs to units, where it was asked for.
            metrics = {name: jnp.nanmedian(value) if value.ndim else value for name, value in metrics.items()}
            if done % every == 0 or done == self.mechanism.steps:
                metrics["epsilon"] = self.mechanism.epsilon(done)
            return state, metrics

        return step

    @property
    def about(self) -> dict[str, Any]:
        """What is written down of the run: its mechanism, whose secret it has, and what takes from its epsilon."""
        return _about(self.mechanism, self.secret, self.options)

    def metadata(self, done: int) -> dict[str, Any]:
        """What checkpoints say: whose secret, by what mechanism, and what is spent; not the secret."""
        spent = {"epsilon": self.mechanism.epsilon(done - self.before), "before": self.before}
        return spent | {"privacy": self.about}

    def check(self, path: Path, metadata: Mapping[str, Any]) -> None:
        """Raises Refusal for a checkpoint of another mechanism or secret."""
        _same(path, metadata.get("privacy", self.about), self.about)


def check_private_job(job: Job, objective: Objective) -> None:
    """Raises Refusal for options that would release what nobody accounts for, or that a private run cannot keep to."""
    if objective.couple is not None:
        raise Refusal(
            f"the loss {job.loss.name} couples the examples of a batch, so that none can be clipped by itself: choose "
            "another for a private run"
        )
    clipped_by_operations = job.privacy.groupwise or job.privacy.method in ("ghost", "bk", "group")
    if clipped_by_operations and (objective.heads or objective.statistics):
        raise Refusal(
            f"the loss {job.loss.name} reads more than log-probabilities and their normaliser, of which the methods "
            "ghost, bk and group know nothing: leave --privacy.method and --privacy.groupwise out, or choose another "
            "loss"
        )
    if job.data is None:
        raise Refusal("a private run learns from --data: samples of its own are no data of anybody")
    if job.evaluation.data is None:
        raise Refusal("an evaluation releases what it looks at: give public prompts with --evaluation.data")
    if job.baseline != "none":
        raise Refusal("a baseline of a prompt's other answers is a release of those: leave --baseline out")
    if job.seed and not job.privacy.insecure_deterministic:
        raise Refusal(
            "a seed that is known takes the noise off again: leave --seed out, or add --privacy.insecure-deterministic "
            "to a test"
        )


def begin(run: Run, trainable, buffer: Buffer, objective: Objective, references: References) -> Private:
    """The parts of a run, those of before where it goes on.

    Raises:
        Refusal: options or data do not go with a private run, or its secret is gone.
    """
    job, options = run.job, run.job.privacy
    units = units_of(buffer, objective.unit, options.unit)
    if job.batch_size > len(units):
        raise Refusal(f"a batch of {job.batch_size} is larger than the data of {len(units)} units: lower --batch-size")
    mechanism = options.mechanism(
        trainable, dataset_size=len(units), expected_batch=job.batch_size, example=objective.unit,
        steps=math.ceil(round(job.epochs * len(units) / job.batch_size, 9)),
        multiple=data_devices(run.mesh) * job.microbatches,
    )  # fmt: skip
    if mechanism.delta >= 1 / len(units):
        print(
            f"warning: delta {mechanism.delta:g} is not below 1 / {len(units)} units of data: publishing one of them "
            "would be as private",
            file=sys.stderr,
        )
    secret = _secret(run)
    batches = PrivateBatches(buffer, units, mechanism, secret, references=references, mesh=run.mesh)
    file, about = run.directory.privacy, _about(mechanism, secret, options)
    if not file.exists():
        write_json(file, about | {"epsilon": mechanism.epsilon()})
    _same(file, {name: value for name, value in read_json(file).items() if name != "epsilon"}, about)
    return Private(mechanism, secret, batches, options)


def _about(mechanism: Mechanism, secret: Secret, options: Privacy) -> dict[str, Any]:
    """As JSON values; a key that can be guessed, or units that are shown, leave no epsilon, which is said as well."""
    return dataclasses.asdict(mechanism) | {
        "clip": repr(mechanism.clip), "secret": secret.fingerprint, "insecure": options.insecure_deterministic,
        "shown": options.log_private,
    }  # fmt: skip


def _same(path: Path, known: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    for name, there in known.items():
        if there != about.get(name):
            raise Refusal(
                f"{path} accounts for {name} {there!r}, but this run would have {about.get(name)!r}: restore "
                f"{_RESTORE.get(name, 'the options that it was begun with')}, or begin another run"
            )


def _secret(run: Run) -> Secret:
    options, path = run.job.privacy, run.job.privacy.secret or run.directory.secret
    if options.insecure_deterministic:
        return Secret.insecure(run.job.seed)
    if run.directory.privacy.exists():
        return Secret.read(path)
    if jax.process_count() > 1:
        raise Refusal("a private run on several hosts needs one secret for all: this is not supported yet")
    if run.job.resume:
        if run.log.rows("update") or any(run.directory.checkpoints.glob("[0-9]*")):
            raise Refusal(
                f"{run.directory.privacy} is gone, which accounts for what this run has released: restore it, or begin "
                "another run"
            )
        if path == run.directory.secret:
            # Nothing was released with it: the run stopped between the two files.
            path.unlink(missing_ok=True)
    return Secret.create(path)
