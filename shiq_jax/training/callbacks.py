"""Callbacks of `fit` that any training loop can use: refuse numbers that are not finite, save checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from shiq_jax.errors import UserError
from shiq_jax.training.checkpoints import Checkpoints
from shiq_jax.training.fit import Callback, FinishedUpdate
from shiq_jax.training.state import State

# Of these names the metrics that an update returns must be finite.
CHECKED = ("loss", "grad_norm", "param_norm")


class CheckFinite(Callback):
    """Stop with a UserError when loss, gradient norm or parameter norm is not finite, before that state is saved.

    Args:
        name: of the updates, for the message.
        records: record by number, to name the groups of the batch; None where batches have no record numbers.
    """

    def __init__(self, name: str = "update", records: Any = None):
        self.name, self.records = name, records

    def on_update(self, done: FinishedUpdate) -> None:
        """Raises UserError naming the numbers, the step and, where known, its records."""
        bad = [name for name in CHECKED if not math.isfinite(done.metrics.get(name, 0))]
        if not bad:
            return
        members = done.item.members
        numbers = [] if members is None else sorted({int(index) for index in np.ravel(members) if index >= 0})
        of, remedy = "", ""
        if numbers:
            groups = sorted({self.records[index].group for index in numbers}) if self.records is not None else ()
            of = f" (records {_some(numbers)}{f' of groups {_some(groups)}' if groups else ''})"
            remedy = ", or without those records"
        raise UserError(
            f"{' and '.join(bad)} of {self.name} step {done.step}{of} {'is' if len(bad) == 1 else 'are'} not finite; "
            "every checkpoint is from before it, and --resume would come here again: begin another run with a lower "
            f"learning rate{remedy}"
        )


class SaveCheckpoints(Callback):
    """Save the state every so many updates and after the last one.

    Args:
        checkpoints: where to.
        every: updates between two checkpoints; None saves the last state only.
        metadata: step -> JSON values to save with the state.
        metrics: numbers to save with the state of this step, for `Checkpoints(best=...)`; a state that has some is
            saved whatever its step is.
    """

    def __init__(
        self, checkpoints: Checkpoints, *, every: int | None = None,
        metadata: Callable[[int], Mapping[str, Any]] = lambda step: {},
        metrics: Callable[[], Mapping[str, float]] = dict,
    ):  # fmt: skip
        self.checkpoints, self.every, self.metadata, self.metrics = checkpoints, every, metadata, metrics

    def needs_state(self, step: int) -> bool:
        """At multiples of `every`."""
        return bool(self.every) and step % self.every == 0

    def on_state(self, step: int, state: State, last: bool) -> None:
        """Save where it is due."""
        if last or self.metrics() or self.needs_state(step):
            self.save(state, step)

    def save(self, state: State, step: int) -> None:
        """Start saving the state of a step, due or not."""
        self.checkpoints.save(state, self.metadata(step), self.metrics())


def _some(things: Sequence, shown: int = 16) -> str:
    more = f" and {len(things) - shown} more" if len(things) > shown else ""
    return ", ".join(map(str, things[:shown])) + more
