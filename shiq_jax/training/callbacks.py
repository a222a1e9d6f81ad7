"""Callbacks of `fit` that do not depend on a run: reject non-finite updates, save checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from shiq_jax.errors import UserError
from shiq_jax.training.checkpoints import Checkpoints
from shiq_jax.training.fit import Callback, UpdateResult
from shiq_jax.training.state import State

# Metrics that must be finite if the update returns them.
FINITE_METRICS = ("loss", "grad_norm", "param_norm")


class CheckFinite(Callback):
    """Raise UserError if the loss, gradient norm or parameter norm is not finite, before that state is saved.

    Args:
        name: name of the updates in the message.
        records: record by index, to name the groups of the batch; None if batches have no record indices.
    """

    def __init__(self, name: str = "update", records: Any = None):
        self.name, self.records = name, records

    def on_update(self, result: UpdateResult) -> None:
        """Raises UserError with the metrics, the step and, if known, the records of the batch."""
        non_finite = [name for name in FINITE_METRICS if not math.isfinite(result.metrics.get(name, 0))]
        if not non_finite:
            return
        members = result.batch.members
        indices = [] if members is None else sorted({int(index) for index in np.ravel(members) if index >= 0})
        source, remedy = "", ""
        if indices:
            groups = sorted({self.records[index].group for index in indices}) if self.records is not None else ()
            source = f" (records {_join(indices)}{f' of groups {_join(groups)}' if groups else ''})"
            remedy = ", or without those records"
        raise UserError(
            f"{' and '.join(non_finite)} of {self.name} step {result.step}{source} "
            f"{'is' if len(non_finite) == 1 else 'are'} not finite; every checkpoint precedes this step, and --resume "
            f"would fail at it again: start another run with a lower learning rate{remedy}"
        )


class SaveCheckpoints(Callback):
    """Save the state every `every` updates and after the last one.

    Args:
        checkpoints: destination.
        every: updates between two checkpoints; None saves the last state only.
        metadata: step -> JSON values to save with the state.
        metrics: returns the metrics to save with the current state, for `Checkpoints(best=...)`; a state with metrics
            is saved at any step.
    """

    def __init__(
        self, checkpoints: Checkpoints, *, every: int | None = None,
        metadata: Callable[[int], Mapping[str, Any]] = lambda step: {},
        metrics: Callable[[], Mapping[str, float]] = dict,
    ):  # fmt: skip
        self.checkpoints, self.every, self.metadata, self.metrics = checkpoints, every, metadata, metrics

    def needs_state(self, step: int) -> bool:
        """Whether `step` is a multiple of `every`."""
        return bool(self.every) and step % self.every == 0

    def on_state(self, step: int, state: State, last: bool) -> None:
        """Save if a checkpoint is due."""
        if last or self.metrics() or self.needs_state(step):
            self.save(state, step)

    def save(self, state: State, step: int) -> None:
        """Start saving the state unconditionally."""
        self.checkpoints.save(state, self.metadata(step), self.metrics())


def _join(items: Sequence, limit: int = 16) -> str:
    rest = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(map(str, items[:limit])) + rest
