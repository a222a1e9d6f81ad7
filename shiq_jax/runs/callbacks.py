"""Callbacks of `fit` that belong to a run: log, evaluate, show progress, end early, stop on request."""

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

# Mean |lse| in nats below which logits are taken for normalized ones.
NORMALIZED = 1e-4


class LogUpdates(Callback):
    """One line of the log per update.

    Args:
        log: the file.
        stage: the `stage` of every line.
        learning_rate: step -> learning rate.
        before: updates of earlier rounds, added to the step of every line.
        tags: additional fields of every line.
        more: step -> additional numbers.

    Attributes:
        latest: the newest line.
    """

    def __init__(
        self, log: MetricsLog, stage: str, learning_rate: Callable, *, before: int = 0,
        tags: Mapping[str, Any] = {}, more: Callable[[int], Mapping[str, Any]] = lambda step: {},
    ):  # fmt: skip
        self.log, self.stage, self.learning_rate = log, stage, learning_rate
        self.before, self.tags, self.more = before, tags, more
        self.latest: Mapping[str, Any] = {}

    def on_update(self, done: UpdateResult) -> None:
        """Write the line; a metric with one number per unit is reduced to its median."""
        metrics = {name: np.nanmedian(value) if np.ndim(value) else value for name, value in done.metrics.items()}
        about = {"seconds": round(done.seconds, 4), "compiled": done.compiled}
        if done.batch.tokens is not None:
            about |= {
                "tokens": done.batch.tokens,
                "waited": round(done.wait_seconds, 4),
                "fill": round(done.batch.fill, 4),
            }
        rate = float(self.learning_rate(done.step - 1))
        self.latest = metrics | dict(self.more(done.step)) | {"learning_rate": rate} | about | dict(self.tags)
        self.log.write(self.stage, self.before + done.step, **self.latest)


class EvaluatePolicy(Callback):
    """Evaluate every so many updates and at the end of each phase; sample where passes over the data end.

    Args:
        evaluate: (state, step, passes over the data) -> numbers.
        sample: called with the same arguments to store some generations.
        every: updates between evaluations; None evaluates after the last one only.
        before: called with (state, step) before each evaluation.

    Attributes:
        numbers: those of the current step; empty if it was not evaluated.
        latest: reward and KL of the newest evaluation.
    """

    def __init__(
        self, evaluate: Callable[[State, int, float], Mapping[str, float]],
        sample: Callable[[State, int, float], None], *, every: int | None,
        before: Callable[[State, int], None] = lambda state, step: None,
    ):  # fmt: skip
        self.evaluate, self.sample, self.every, self.before = evaluate, sample, every, before
        self.numbers: Mapping[str, float] = {}
        self.latest: dict[str, float] = {}
        self._began, self._steps_per_pass = 0, None
        self._pass_ends: Collection[int] = ()

    def begin(self, phase, began: int) -> None:
        """Start a phase after `began` updates."""
        self._began, self._steps_per_pass = began, phase.steps_per_pass
        self._pass_ends = {began + end for end in phase.pass_ends}

    def needs_state(self, step: int) -> bool:
        """Whether an evaluation or sampling is due."""
        return bool(self.every) and step % self.every == 0 or step in self._pass_ends

    def on_state(self, step: int, state: State, last: bool) -> None:
        """Evaluate or sample if due; after a stop request this is left to the resumed run."""
        self.numbers = {}
        if stopping.requested():
            return
        passes = (step - self._began) / self._steps_per_pass if self._steps_per_pass else 0.0
        with contextlib.suppress(stopping.Stopped):
            if last or (self.every and step % self.every == 0):
                self.before(state, step)
                self.numbers = self.evaluate(state, step, passes)
                self.latest.update({name: self.numbers[name] for name in ("reward", "kl") if name in self.numbers})
            elif step in self._pass_ends:
                self.sample(state, step, passes)


class EndWhen(Callback):
    """End the loop when `enough(step)` is true, checked every `window` updates; a window of None never ends it."""

    def __init__(self, window: int | None, enough: Callable[[int], bool]):
        self.window, self.enough = window, enough

    def needs_state(self, step: int) -> bool:
        """At the end of a window, so that the log is complete when `enough` reads it."""
        return bool(self.window) and step % self.window == 0

    def should_stop(self, step: int) -> bool:
        """Whether there have been enough updates."""
        return self.needs_state(step) and self.enough(step)


class StopOnRequest(Callback):
    """Save and raise `Stopped` when the process is asked to stop.

    Args:
        name: of the updates, for the message.
        total: updates of the whole loop.
        saving: saves the state.
    """

    def __init__(self, name: str, total: int, saving: SaveCheckpoints):
        self.name, self.total, self.saving = name, total, saving

    def needs_state(self, step: int) -> bool:
        """As soon as a stop is requested."""
        return stopping.requested()

    def on_state(self, step: int, state: State, last: bool) -> None:
        """Raises Stopped, with the state on disk, if a stop is requested."""
        if stopping.requested():
            self.saving.save(state, step)
            self.saving.checkpoints.wait()
            raise stopping.Stopped(f"at {self.name} {step} of {self.total}")


class WarnIfNormalized(Callback):
    """Warn once if the logits seem normalized: the policy is the same, but a log-sum-exp of 0 carries no value."""

    warned = False

    def on_update(self, done: UpdateResult) -> None:
        """Check the first update."""
        size = done.metrics.get("lse_abs", 1)
        if not self.warned and size < NORMALIZED:
            print(
                f"warning: the log-sum-exp of the logits is {size:.1e} on average, as if they were normalized already: "
                "ShiQ learns from its size, so give the model's raw logits",
                file=sys.stderr,
            )
        self.warned = True


class ShowProgress(Callback):
    """Report updates to a progress display, with the newest numbers of the log and of the evaluation.

    Attributes:
        advance: called with the tokens of every update; set when the display is open.
    """

    def __init__(self, log: LogUpdates, evaluation: EvaluatePolicy | None):
        self._log, self._evaluation = log, evaluation
        self.advance: Callable[[float], None] = lambda amount: None

    def on_update(self, done: UpdateResult) -> None:
        """Advance by one update."""
        self.advance(done.batch.tokens or 0)

    def note(self) -> str:
        """The newest numbers as text."""
        found = {name: float(self._log.latest[name]) for name in ("loss", "epsilon") if name in self._log.latest}
        found |= self._evaluation.latest if self._evaluation is not None else {}
        return ", ".join(f"{name} {value:.4g}" for name, value in found.items())
