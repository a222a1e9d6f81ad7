"""Public data in a private run: a phase of public updates or a part of every update, and diagnostics."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import numpy as np
import optax

from shiq_jax.objectives import Objective
from shiq_jax.privacy import Mechanism, has_plateaued, mixing_weight, monitor, noise_is_affordable, reset_optimizer
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

STAGE, MEASURED = "public", "improvement"
# Number of units, and of batches of them, that the diagnostics are measured on.
LOOKED_AT, BATCHES = 128, 8


class PublicData:
    """Public data of a private run.

    Args:
        run: its options, mesh, log and keys.
        buffer, references: the data, and by name the statistics that fill `Example.references`.
        objective: of the run.
        mechanism: of its private updates.
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
        # Maximum number of public updates; 0 if public gradients are mixed into the private updates.
        self.steps = math.ceil(round(mechanism.steps * share / (1 - share), 9)) if self.first else 0
        self._looked = _cut(buffer, objective.unit, references)
        self._look: Callable | None = None

    @property
    def first(self) -> bool:
        """Whether public updates precede the private ones instead of being mixed into them."""
        return self.options.rule == "switch"

    def enough(self, done: int) -> bool:
        """Whether the public phase ends after `done` updates, by the log's public numbers at the end of a window."""
        log, window, options = self._run.log, self.options.window, self.options
        if done % window or not done:
            return False
        losses = np.array([row["loss"] for row in log.rows(STAGE)][:done])
        if options.stall is not None and has_plateaued(losses.reshape(-1, window).mean(axis=1), 1, options.stall):
            return True
        # Ignore later measurements so that a resumed run decides identically. An estimated trace below 0 says nothing
        # about noise.
        rows = [row for row in log.rows(MEASURED) if row["step"] < done and row["trace"] > 0]
        slowdowns = [row["slowdown"] for row in rows]
        return options.slowdown is not None and noise_is_affordable(slowdowns, options.slowdown)

    def changed_over(self, state: State) -> State:
        """The state that the private phase starts with."""
        if self.options.reset == "none":
            return state
        return state._replace(opt_state=reset_optimizer(state.opt_state, self.options.reset))

    def phase(self, model, optimizer: optax.GradientTransformation) -> Phase:
        """Updates on public data only, which may end before `steps`."""
        run, options = self._run, self.options
        update = make_update(model, self._objective, optimizer, mesh=run.mesh, microbatches=run.job.microbatches)
        return Phase(
            STAGE, update, self.batches, self.steps, on_end=self.changed_over, records=self.batches.records,
            metadata=lambda done: {"epsilon": 0.0}, enough=self.enough,
            window=None if options.stall is None and options.slowdown is None else options.window,
        )  # fmt: skip

    def mixed(self, private: Callable[[int], DeviceBatch]) -> Callable[[int], DeviceBatch]:
        """Batches of private updates, each with a public one and its weight as keywords of the update."""

        def batches(step: int) -> DeviceBatch:
            own, public = private(step), self.batches(step)
            return own._replace(batch=(own.batch, {"public": public.batch, "public_weight": self.weight(step)}))

        return batches

    def weight(self, step: int) -> float:
        """Weight of the public gradient in a private update."""
        return mixing_weight(self.options.rule, step, self._mechanism.steps, self.options.share)

    def begin(self, model, state: State, step: int) -> None:
        """Measure once before the first update; a resumed run has done it."""
        if not self._run.log.rows(MEASURED):
            self.look(model, state, step)

    def look(self, model, state: State, step: int) -> None:
        """Log the loss improvement of a private update with and without noise, estimated on public data."""
        if not self.options.probes or self._looked is None:
            return
        if self._look is None:
            about = dict(mechanism=self._mechanism, b2=self._run.job.optimizer.b2, probes=self.options.probes)

            def look(state: State, batches, key):
                losses = UnitLosses(model, self._objective, state.frozen, state.targets)
                return monitor(losses, state.trainable, state.opt_state, batches, key, **about)

            self._look = jax.jit(look)
        key = jax.random.fold_in(self._run.key(RngStream.CURVATURE), step)
        log: MetricsLog = self._run.log
        log.rewind([MEASURED], step - 1)
        log.write(MEASURED, step, **hosts.gather(self._look(state, self._looked, key)))


def _cut(buffer: Buffer, unit: str, references: References):
    """Some units, one per row, as stacked equal batches; None if there are too few for two batches."""
    units = privacy_units(buffer, unit)[:LOOKED_AT]
    count = min(BATCHES, len(units))
    if count < 2:
        return None
    trees = Trees(buffer)
    shape = plan(trees, units)._replace(slots=1)
    rows = [pack([each], trees, shape, references=references).batch for each in units[: len(units) // count * count]]
    return jax.tree.map(lambda *leaves: np.concatenate(leaves).reshape(count, -1, *leaves[0].shape[1:]), *rows)
