"""Public data in a private run: a public phase or public gradients in every update, and diagnostics."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import numpy as np
import optax

from shiq_jax.objectives import Objective
from shiq_jax.privacy import (
    Mechanism,
    has_plateaued,
    improvement_metrics,
    mixing_weight,
    noise_is_affordable,
    reset_optimizer,
)
from shiq_jax.replay import Buffer, References, Trees, pack, plan
from shiq_jax.runs.metrics import MetricsLog
from shiq_jax.runs.phases import Phase
from shiq_jax.runs.run import RngStream, Run
from shiq_jax.sharding import hosts
from shiq_jax.training.batches import Batches, DeviceBatch
from shiq_jax.training.private_batches import privacy_units
from shiq_jax.training.private_gradient import UnitLosses
from shiq_jax.training.state import State
from shiq_jax.training.update import make_update

# Stages of the log: public updates, and loss-improvement diagnostics.
STAGE, DIAGNOSTICS_STAGE = "public", "improvement"
# Number of units, and of batches of them, that the diagnostics use.
DIAGNOSTIC_UNITS, DIAGNOSTIC_BATCHES = 128, 8


class PublicData:
    """Public data of a private run.

    Args:
        run: options, mesh, log and keys.
        buffer: the public records.
        references: reference name -> token statistics for `Example.references`.
        objective: objective of the run.
        mechanism: mechanism of the private updates.
    """

    def __init__(
        self, run: Run, buffer: Buffer, references: References, objective: Objective, mechanism: Mechanism
    ):  # fmt: skip
        job = run.job
        self.options, self._run, self._objective, self._mechanism = job.public, run, objective, mechanism
        self.batches = Batches(
            buffer, objective.unit, job.batch_size, seed=job.seed, references=references, mesh=run.mesh,
            microbatches=job.microbatches, row_length=job.row_length,
        )  # fmt: skip
        share = self.options.share
        # Maximum number of updates of the public phase; 0 without a public phase.
        self.steps = math.ceil(round(mechanism.steps * share / (1 - share), 9)) if self.has_phase else 0
        self._diagnostic_batches = _diagnostic_batches(buffer, objective.unit, references)
        self._diagnostics: Callable | None = None

    @property
    def has_phase(self) -> bool:
        """Whether a public phase precedes the private one; otherwise public gradients are mixed into every update."""
        return self.options.rule == "switch"

    def should_switch(self, step: int) -> bool:
        """Whether the public phase ends after `step` updates, according to its logged losses and diagnostics."""
        log, window, options = self._run.log, self.options.window, self.options
        if step % window or not step:
            return False
        losses = np.array([row["loss"] for row in log.rows(STAGE)][:step])
        if options.stall is not None and has_plateaued(losses.reshape(-1, window).mean(axis=1), 1, options.stall):
            return True
        # Later diagnostics would make a resumed run decide differently; a negative trace estimate is uninformative.
        rows = [row for row in log.rows(DIAGNOSTICS_STAGE) if row["step"] < step and row["trace"] > 0]
        slowdowns = [row["slowdown"] for row in rows]
        return options.slowdown is not None and noise_is_affordable(slowdowns, options.slowdown)

    def reset_optimizer_state(self, state: State) -> State:
        """The initial state of the private phase."""
        if self.options.reset == "none":
            return state
        return state._replace(opt_state=reset_optimizer(state.opt_state, self.options.reset))

    def phase(self, model, optimizer: optax.GradientTransformation) -> Phase:
        """The public phase, with at most `steps` updates."""
        run, options = self._run, self.options
        update = make_update(model, self._objective, optimizer, mesh=run.mesh, microbatches=run.job.microbatches)
        return Phase(
            STAGE, update, self.batches, self.steps, on_end=self.reset_optimizer_state, records=self.batches.records,
            metadata=lambda step: {"epsilon": 0.0}, should_end=self.should_switch,
            check_every=None if options.stall is None and options.slowdown is None else options.window,
        )  # fmt: skip

    def mix_into(self, private: Callable[[int], DeviceBatch]) -> Callable[[int], DeviceBatch]:
        """Batches of private updates, each paired with the keyword arguments of its public gradient."""

        def batches(step: int) -> DeviceBatch:
            private_batch, public = private(step), self.batches(step)
            kwargs = {"public": public.batch, "public_weight": self.weight(step)}
            return private_batch._replace(batch=(private_batch.batch, kwargs))

        return batches

    def weight(self, step: int) -> float:
        """Weight of the public gradient in a private update."""
        return mixing_weight(self.options.rule, step, self._mechanism.steps, self.options.share)

    def begin(self, model, state: State, step: int) -> None:
        """Log diagnostics before the first update; a resumed run has already done so."""
        if not self._run.log.rows(DIAGNOSTICS_STAGE):
            self.log_diagnostics(model, state, step)

    def log_diagnostics(self, model, state: State, step: int) -> None:
        """Log the loss improvement of a private update with and without noise, estimated on public data."""
        if not self.options.probes or self._diagnostic_batches is None:
            return
        if self._diagnostics is None:
            kwargs = dict(mechanism=self._mechanism, b2=self._run.job.optimizer.b2, probes=self.options.probes)

            def diagnostics(state: State, batches, key):
                losses = UnitLosses(model, self._objective, state.frozen, state.targets)
                return improvement_metrics(losses, state.trainable, state.opt_state, batches, key, **kwargs)

            self._diagnostics = jax.jit(diagnostics)
        key = jax.random.fold_in(self._run.key(RngStream.CURVATURE), step)
        log: MetricsLog = self._run.log
        log.rewind([DIAGNOSTICS_STAGE], step - 1)
        log.write(DIAGNOSTICS_STAGE, step, **hosts.gather(self._diagnostics(state, self._diagnostic_batches, key)))


def _diagnostic_batches(buffer: Buffer, unit: str, references: References):
    """Some units, one per row, as stacked batches of equal size; None if there are fewer than two units."""
    units = privacy_units(buffer, unit)[:DIAGNOSTIC_UNITS]
    count = min(DIAGNOSTIC_BATCHES, len(units))
    if count < 2:
        return None
    trees = Trees(buffer)
    shape = plan(trees, units)._replace(slots=1)
    units = units[: len(units) // count * count]
    rows = [pack([unit], trees, shape, references=references).batch for unit in units]
    return jax.tree.map(lambda *leaves: np.concatenate(leaves).reshape(count, -1, *leaves[0].shape[1:]), *rows)
