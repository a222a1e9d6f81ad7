"""Phases of one policy's training, such as public then private updates, run in order and resumable in any phase."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import optax

from shiq_jax.progress import counter
from shiq_jax.runs.callbacks import (
    EarlyStopping,
    EvaluatePolicy,
    LogUpdates,
    ShowProgress,
    StopOnRequest,
    WarnIfNormalized,
)
from shiq_jax.runs.metrics import MetricsLog
from shiq_jax.runs.run_directory import check_same_settings
from shiq_jax.training.batches import DeviceBatch
from shiq_jax.training.callbacks import CheckFinite, SaveCheckpoints
from shiq_jax.training.checkpoints import Checkpoints
from shiq_jax.training.fit import Callback, fit
from shiq_jax.training.state import State


class Phase(NamedTuple):
    """A sequence of updates with one update function and one source of batches.

    Attributes:
        name: `stage` of its lines in metrics.jsonl.
        update: `update(state, batch) -> (state, metrics)`.
        batches: number of updates so far -> the next batch.
        steps: maximum number of updates.
        on_end: maps the last state to the initial state of the next phase.
        steps_per_epoch: updates of one pass over the data; None if epochs are not counted.
        epoch_ends: updates of this phase after which an epoch ends.
        records: record by number, to name the records of a bad batch; None if batches have no record numbers.
        metrics: updates of this phase so far -> additional metrics for the log.
        metadata: updates of this phase so far -> additional JSON values for a checkpoint.
        check: called with the metadata of the checkpoint that this phase resumes from; raises UserError on a mismatch.
        check_every: updates between two calls of `should_end`; None never calls it.
        should_end: updates of this phase so far -> whether the phase ends early; the log is complete when it is called.
    """

    name: str
    update: Callable[[State, Any], tuple[State, Mapping[str, Any]]]
    batches: Callable[[int], DeviceBatch]
    steps: int
    on_end: Callable[[State], State] = lambda state: state
    steps_per_epoch: int | None = None
    epoch_ends: Sequence[int] = ()
    records: Any = None
    metrics: Callable[[int], Mapping[str, Any]] = lambda step: {}
    metadata: Callable[[int], Mapping[str, Any]] = lambda step: {}
    check: Callable[[Mapping[str, Any]], None] = lambda metadata: None
    check_every: int | None = None
    should_end: Callable[[int], bool] = lambda step: False


class Plan(NamedTuple):
    """A training plan: phases that share one optimizer.

    Attributes:
        phases: in order.
        optimizer: optax transformation of all phases.
        learning_rate: step -> learning rate, for the log.
        on_start: called once with the initial or restored state and its step.
        on_evaluation: called with the state and its step before each evaluation.
    """

    phases: Sequence[Phase]
    optimizer: optax.GradientTransformation
    learning_rate: optax.Schedule
    on_start: Callable[[State, int], None] = lambda state, step: None
    on_evaluation: Callable[[State, int], None] = lambda state, step: None

    @property
    def steps(self) -> int:
        """Maximum number of updates of all phases."""
        return sum(phase.steps for phase in self.phases)


class Outputs(NamedTuple):
    """Where phases write, and the settings that they record.

    Attributes:
        log: metrics log with one line per update.
        checkpoints: checkpoints of this policy's training.
        settings: JSON values stored in checkpoints; a checkpoint with other settings is rejected.
        save_every: updates between checkpoints.
        step_offset: updates of earlier rounds, added to the steps of the log.
        tags: additional fields of every line.
    """

    log: MetricsLog
    checkpoints: Checkpoints
    settings: Mapping[str, Any]
    save_every: int
    step_offset: int = 0
    tags: Mapping[str, Any] = {}


def epoch_ends(batches, epochs: float) -> list[int]:
    """Numbers of updates after which an epoch ends; `batches.steps(n)` counts the updates of n epochs."""
    return [batches.steps(number) for number in range(1, int(epochs) + 1)]


def run_phases(
    plan: Plan, state: State, outputs: Outputs, evaluation: EvaluatePolicy | None = None, stages: Sequence[str] = ()
) -> State:
    """Run all phases, resuming from the newest checkpoint if there is one, and return the last state.

    Args:
        plan: phases and optimizer.
        state: initial state of the first phase; replaced by a restored checkpoint.
        outputs: log and checkpoints.
        evaluation: callback that evaluates and samples; None disables both.
        stages: additional stages of the log that are rewound to the checkpoint.

    Raises:
        UserError: a checkpoint has other settings, or metrics are not finite.
        Stopped: a stop was requested; the state is saved.
    """
    # Closing finishes a save in progress, also after an exception.
    with contextlib.closing(outputs.checkpoints):
        metadata: Mapping[str, Any] = {}
        if outputs.checkpoints.latest() is not None:
            state, metadata = outputs.checkpoints.restore(state)
            check_same_settings(outputs.checkpoints.directory, metadata.get("settings") or {}, outputs.settings)
        names = [phase.name for phase in plan.phases]
        current = names.index(metadata["phase"]) if metadata else 0
        outputs.log.rewind((*names, *stages), outputs.step_offset + int(state.step))
        plan.on_start(state, int(state.step))
        phase_start = metadata.get("began", int(state.step))
        if metadata:
            plan.phases[current].check(metadata)
        for phase in plan.phases[current:]:
            state = phase.on_end(_run_phase(phase, state, phase_start, plan, outputs, evaluation))
            phase_start = int(state.step)
    return state


def _run_phase(
    phase: Phase, state: State, phase_start: int, plan: Plan, outputs: Outputs, evaluation: EvaluatePolicy | None
) -> State:
    """Run one phase, which starts after `phase_start` updates, from the step of the state to its end."""
    start, stop = int(state.step), phase_start + phase.steps

    def metadata(step: int) -> dict[str, Any]:
        fields = {"settings": outputs.settings, "phase": phase.name, "began": phase_start}
        return fields | phase.metadata(step - phase_start)

    saving = SaveCheckpoints(
        outputs.checkpoints, every=outputs.save_every, metadata=metadata,
        metrics=lambda: evaluation.metrics if evaluation is not None else {},
    )  # fmt: skip
    early_stopping = EarlyStopping(phase.check_every, phase.should_end)
    complete = start == stop or (start > phase_start and early_stopping.should_stop(start))
    log = LogUpdates(
        outputs.log, phase.name, plan.learning_rate, step_offset=outputs.step_offset, tags=outputs.tags,
        extra_metrics=lambda step: phase.metrics(step - phase_start),
    )  # fmt: skip
    progress = ShowProgress(log, evaluation)
    state_callbacks: list[Callback] = [saving, StopOnRequest(phase.name, stop, saving)]
    if evaluation is not None:
        evaluation.begin(phase, phase_start)
        state_callbacks = [evaluation, *state_callbacks]
        # A stopped run saves its last step without evaluating it, so the resumed run does.
        if start and (complete or evaluation.needs_state(start)) and outputs.checkpoints.metrics(start) is None:
            for callback in state_callbacks:
                callback.on_state(start, state, complete)
    callbacks = [
        CheckFinite(phase.name, phase.records), WarnIfNormalized(), log, progress, early_stopping, *state_callbacks,
    ]  # fmt: skip
    if not complete:
        display = counter(phase.name, stop, "updates", initial=start, amount="tokens", postfix=progress.note)
        with display as progress.advance:
            state = fit(state, phase.update, phase.batches, start=start, stop=stop, callbacks=callbacks)
    outputs.checkpoints.wait()
    return state
