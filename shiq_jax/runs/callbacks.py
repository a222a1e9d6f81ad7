"""Callbacks of `fit` for runs: logging, evaluation, progress, early stopping, stop requests."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np

from shiq_jax import stopping
from shiq_jax.runs.metrics import MetricsLog
from shiq_jax.training.callbacks import SaveCheckpoints
from shiq_jax.training.fit import Callback, UpdateResult
from shiq_jax.training.state import State

# Mean |lse| in nats below which logits count as normalized.
NORMALIZED = 1e-4


class LogUpdates(Callback):
    """Log one line per update.

    Args:
        log: the metrics log.
        stage: the `stage` of every line.
        learning_rate: step -> learning rate.
        step_offset: updates of earlier rounds, added to the step of every line.
        tags: additional fields of every line.
        extra_metrics: step -> additional metrics.

    Attributes:
        latest: the newest line.
    """

    def __init__(
        self, log: MetricsLog, stage: str, learning_rate: Callable, *, step_offset: int = 0,
        tags: Mapping[str, Any] = {}, extra_metrics: Callable[[int], Mapping[str, Any]] = lambda step: {},
    ):  # fmt: skip
        self.log, self.stage, self.learning_rate = log, stage, learning_rate
        self.step_offset, self.tags, self.extra_metrics = step_offset, tags, extra_metrics
        self.latest: Mapping[str, Any] = {}

    def on_update(self, update: UpdateResult) -> None:
        """Write the line; a metric with one value per unit is reduced to its median."""
        metrics = {name: np.nanmedian(value) if np.ndim(value) else value for name, value in update.metrics.items()}
        timing = {"seconds": round(update.seconds, 4), "compiled": update.compiled}
        if update.batch.tokens is not None:
            timing |= {"tokens": update.batch.tokens, "waited": round(update.wait_seconds, 4)}
            timing |= {"fill": round(update.batch.fill, 4)}
        metrics |= self.extra_metrics(update.step)
        metrics["learning_rate"] = float(self.learning_rate(update.step - 1))
        self.latest = metrics | timing | dict(self.tags)
        self.log.write(self.stage, self.step_offset + update.step, **self.latest)


class EvaluatePolicy(Callback):
    """Evaluate every `every` updates and at the end of each phase; store generations at the end of each epoch.

    Args:
        evaluate: (state, step, epoch) -> metrics.
        sample: called with the same arguments to store some generations.
        every: updates between evaluations; None evaluates only after the last update.
        before: called with (state, step) before each evaluation.

    Attributes:
        metrics: metrics of the current step; empty if it was not evaluated.
        latest: reward and KL of the newest evaluation.
    """

    def __init__(
        self, evaluate: Callable[[State, int, float], Mapping[str, float]],
        sample: Callable[[State, int, float], None], *, every: int | None,
        before: Callable[[State, int], None] = lambda state, step: None,
    ):  # fmt: skip
        self.evaluate, self.sample, self.every, self.before = evaluate, sample, every, before
        self.metrics: Mapping[str, float] = {}
        self.latest: dict[str, float] = {}
        self._phase_start, self._steps_per_epoch = 0, None
        self._epoch_ends: Collection[int] = ()

    def begin(self, phase, phase_start: int) -> None:
        """Start a phase after `phase_start` updates."""
        self._phase_start, self._steps_per_epoch = phase_start, phase.steps_per_epoch
        self._epoch_ends = {phase_start + end for end in phase.epoch_ends}

    def needs_state(self, step: int) -> bool:
        """Whether an evaluation or sampling is due."""
        return bool(self.every) and step % self.every == 0 or step in self._epoch_ends

    def on_state(self, step: int, state: State, last: bool) -> None:
        """Evaluate or sample if due; after a stop request, leave both to the resumed run."""
        self.metrics = {}
        if stopping.requested():
            return
        epoch = (step - self._phase_start) / self._steps_per_epoch if self._steps_per_epoch else 0.0
        with contextlib.suppress(stopping.Stopped):
            if last or (self.every and step % self.every == 0):
                self.before(state, step)
                self.metrics = self.evaluate(state, step, epoch)
                self.latest.update({name: self.metrics[name] for name in ("reward", "kl") if name in self.metrics})
            elif step in self._epoch_ends:
                self.sample(state, step, epoch)


class EarlyStopping(Callback):
    """End the loop once `should_end(step)` is true.

    Args:
        check_every: updates between two checks; None never ends the loop.
        should_end: step -> whether to end the loop.
    """

    def __init__(self, check_every: int | None, should_end: Callable[[int], bool]):
        self.check_every, self.should_end = check_every, should_end

    def needs_state(self, step: int) -> bool:
        """Whether a check is due; requesting the state makes the log complete up to this step."""
        return bool(self.check_every) and step % self.check_every == 0

    def should_stop(self, step: int) -> bool:
        """Whether the loop ends after this update."""
        return self.needs_state(step) and self.should_end(step)


class StopOnRequest(Callback):
    """Save the state and raise `Stopped` after a stop request.

    Args:
        name: name of an update in the message.
        total: updates of the whole loop.
        saving: callback that saves the state.
    """

    def __init__(self, name: str, total: int, saving: SaveCheckpoints):
        self.name, self.total, self.saving = name, total, saving

    def needs_state(self, step: int) -> bool:
        """Whether a stop was requested."""
        return stopping.requested()

    def on_state(self, step: int, state: State, last: bool) -> None:
        """Save the state and raise Stopped if a stop was requested."""
        if stopping.requested():
            self.saving.save(state, step)
            self.saving.checkpoints.wait()
            raise stopping.Stopped(f"at {self.name} {step} of {self.total}")


class WarnIfNormalized(Callback):
    """Warn once if the logits seem to be log-probabilities, whose log-sum-exp is 0 and carries no value."""

    warned = False

    def on_update(self, update: UpdateResult) -> None:
        """Check the first update."""
        mean_lse = update.metrics.get("lse_abs", 1)
        if not self.warned and mean_lse < NORMALIZED:
            print(
                f"warning: the mean |log-sum-exp| of the logits is {mean_lse:.1e}, so they seem to be normalized: ShiQ "
                "learns from the log-sum-exp and needs raw logits",
                file=sys.stderr,
            )
        self.warned = True


class ShowProgress(Callback):
    """Report updates to a progress display, with the newest metrics of the log and of the evaluation.

    Attributes:
        advance: called with the tokens of every update; set when the display is open.
    """

    def __init__(self, log: LogUpdates, evaluation: EvaluatePolicy | None):
        self._log, self._evaluation = log, evaluation
        self.advance: Callable[[float], None] = lambda amount: None

    def on_update(self, update: UpdateResult) -> None:
        """Advance by one update."""
        self.advance(update.batch.tokens or 0)

    def note(self) -> str:
        """The newest metrics as text."""
        metrics = {name: float(self._log.latest[name]) for name in ("loss", "epsilon") if name in self._log.latest}
        metrics |= self._evaluation.latest if self._evaluation is not None else {}
        return ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
