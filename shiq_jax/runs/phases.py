"""Phases of one policy's training, such as public and then private updates: run in order, resumed in any of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import optax

from shiq_jax.progress import counter
from shiq_jax.runs.callbacks import EndWhen, EvaluatePolicy, LogUpdates, ShowProgress, StopOnRequest, WarnIfNormalized
from shiq_jax.runs.metrics import MetricsLog
from shiq_jax.runs.run_directory import refuse_differences
from shiq_jax.training.batches import DeviceBatch
from shiq_jax.training.callbacks import CheckFinite, SaveCheckpoints
from shiq_jax.training.checkpoints import Checkpoints
from shiq_jax.training.fit import Callback, fit
from shiq_jax.training.state import State


class Phase(NamedTuple):
    """Some updates of one kind on batches of one kind.

    Attributes:
        name: the stage of its lines in metrics.jsonl.
        update: `update(state, batch) -> (state, metrics)`.
        batches: number of updates so far -> the next batch.
        steps: maximum number of updates.
        on_end: maps the last state to the one that the next phase starts with.
        steps_per_pass: updates of one pass over the data; None where passes are not counted.
        pass_ends: updates of this phase after which a pass ends.
        records: record by number, to name those of a bad batch; None where batches have no record numbers.
        metrics: updates of this phase so far -> additional numbers for the log.
        metadata: updates of this phase so far -> additional JSON values for a checkpoint.
        check: called with the metadata of the checkpoint that this phase resumes from; raises UserError on a mismatch.
        window, enough: every `window` updates, `enough(updates of this phase)` says whether the phase ends; the log
            then has these updates.
    """

    name: str
    update: Callable[[State, Any], tuple[State, Mapping[str, Any]]]
    batches: Callable[[int], DeviceBatch]
    steps: int
    on_end: Callable[[State], State] = lambda state: state
    steps_per_pass: int | None = None
    pass_ends: Sequence[int] = ()
    records: Any = None
    metrics: Callable[[int], Mapping[str, Any]] = lambda done: {}
    metadata: Callable[[int], Mapping[str, Any]] = lambda done: {}
    check: Callable[[Mapping[str, Any]], None] = lambda metadata: None
    window: int | None = None
    enough: Callable[[int], bool] = lambda done: False


class Plan(NamedTuple):
    """A training plan: phases that share one optimizer.

    Attributes:
        phases: in order.
        optimizer: optax transformation of all their updates.
        learning_rate: step -> its learning rate, for the log.
        on_start: called with the state, and its step, that the phases start or resume from.
        on_evaluation: called with the state and its step before each evaluation.
    """

    phases: Sequence[Phase]
    optimizer: optax.GradientTransformation
    learning_rate: optax.Schedule
    on_start: Callable[[State, int], None] = lambda state, step: None
    on_evaluation: Callable[[State, int], None] = lambda state, step: None

    @property
    def steps(self) -> int:
        """Updates of all phases, at most."""
        return sum(phase.steps for phase in self.phases)


class Ledger(NamedTuple):
    """Where phases write: log and checkpoints, and the settings of both.

    Attributes:
        log: one line per update.
        checkpoints: of this policy's training.
        settings: JSON values that checkpoints carry; a checkpoint of other settings is refused.
        save_every: updates between checkpoints.
        before: updates of earlier rounds, added to the steps of the log.
        tags: additional fields of every line.
    """

    log: MetricsLog
    checkpoints: Checkpoints
    settings: Mapping[str, Any]
    save_every: int
    before: int = 0
    tags: Mapping[str, Any] = {}


def run_phases(
    plan: Plan, state: State, ledger: Ledger, evaluation: EvaluatePolicy | None = None, stages: Sequence[str] = ()
) -> State:
    """Run all phases, from the newest checkpoint if there is one, and return the last state.

    Args:
        plan: what to learn.
        state: initial state of the first phase; a checkpoint replaces it.
        ledger: where to write.
        evaluation: evaluates and samples when due; None does neither.
        stages: other stages of the log that are rewound to the checkpoint.

    Raises:
        UserError: a checkpoint belongs to other settings, or numbers are not finite.
        Stopped: the process was asked to stop; the state is saved.
    """
    # Closed also when an exception ends the phases: a save under way is finished before anything opens the directory.
    with contextlib.closing(ledger.checkpoints):
        found: Mapping[str, Any] = {}
        if ledger.checkpoints.latest() is not None:
            state, found = ledger.checkpoints.restore(state)
            refuse_differences(ledger.checkpoints.directory, found.get("settings") or {}, ledger.settings)
        names = [phase.name for phase in plan.phases]
        current = names.index(found["phase"]) if found else 0
        ledger.log.rewind((*names, *stages), ledger.before + int(state.step))
        plan.on_start(state, int(state.step))
        began = found.get("began", int(state.step))
        for phase in plan.phases[current:]:
            if found:
                phase.check(found)
            state = phase.on_end(_run_phase(phase, state, began, plan, ledger, evaluation))
            began = int(state.step)
    return state


def _run_phase(
    phase: Phase, state: State, began: int, plan: Plan, ledger: Ledger, evaluation: EvaluatePolicy | None
) -> State:
    """Run one phase from the step of the state; the phase began after `began` updates."""
    start, stop = int(state.step), began + phase.steps

    def metadata(step: int) -> dict[str, Any]:
        return {"settings": ledger.settings, "phase": phase.name, "began": began} | phase.metadata(step - began)

    saving = SaveCheckpoints(
        ledger.checkpoints, every=ledger.save_every, metadata=metadata,
        metrics=lambda: evaluation.numbers if evaluation is not None else {},
    )  # fmt: skip
    ending = EndWhen(phase.window, phase.enough)
    ended = start == stop or (start > began and ending.should_stop(start))
    log = LogUpdates(
        ledger.log, phase.name, plan.learning_rate, before=ledger.before, tags=ledger.tags,
        more=lambda step: phase.metrics(step - began),
    )  # fmt: skip
    shown = ShowProgress(log, evaluation)
    of_state: list[Callback] = [saving, StopOnRequest(phase.name, stop, saving)]
    if evaluation is not None:
        evaluation.begin(phase, began)
        of_state = [evaluation, *of_state]
        # A run that was asked to stop did not evaluate its last step.
        if start and (ended or evaluation.needs_state(start)) and ledger.checkpoints.metrics(start) is None:
            for callback in of_state:
                callback.on_state(start, state, ended)
    callbacks = [CheckFinite(phase.name, phase.records), WarnIfNormalized(), log, shown, ending, *of_state]
    if not ended:
        counted = counter(phase.name, stop, "updates", initial=start, amount="tokens", postfix=shown.note)
        with counted as shown.advance:
            state = fit(state, phase.update, phase.batches, start=start, stop=stop, callbacks=callbacks)
    ledger.checkpoints.wait()
    return state
