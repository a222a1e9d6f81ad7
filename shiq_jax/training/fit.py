"""The loop around an update step; everything that happens beside the updates is a callback."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from shiq_jax.sharding import hosts
from shiq_jax.training.batches import DeviceBatch, prefetch
from shiq_jax.training.state import State


class FinishedUpdate(NamedTuple):
    """An update whose metrics are on the host.

    Attributes:
        step: updates so far, this one included.
        item: what it learned from.
        metrics: numpy scalars by name, as the update returned them.
        seconds: from its start, or the end of the update before it, to its end.
        waited: seconds that the loop waited for the batch.
        compiled: whether it is the first of this loop with batches of this shape.
    """

    step: int
    item: DeviceBatch
    metrics: Mapping[str, Any]
    seconds: float
    waited: float
    compiled: bool


class Callback:
    """What happens beside the updates of `fit`; a subclass overrides what it needs."""

    def on_update(self, done: FinishedUpdate) -> None:
        """Called once per update, while the next one runs."""

    def needs_state(self, step: int) -> bool:
        """Whether `on_state` is to be called after this update; it always is after the last one."""
        return False

    def ends(self, step: int) -> bool:
        """Whether this update, after which some callback needs the state, is the last one."""
        return False

    def on_state(self, step: int, state: State, last: bool) -> None:
        """Called with the state after an update, before the next one starts and takes the state's memory."""


def fit(
    state: State,
    update: Callable[[State, Any], tuple[State, Mapping[str, Any]]],
    batches: Callable[[int], DeviceBatch],
    *,
    start: int,
    stop: int,
    callbacks: Sequence[Callback] = (),
) -> State:
    """Apply `update` to the batches of steps `start` to `stop - 1` and return the last state.

    The metrics of an update are fetched after the next one has been started, so the device does not wait for the host.
    Where a callback needs the state the loop fetches them first: a callback that raises on bad metrics in `on_update`
    does so before any callback has seen, or saved, that state.

    Args:
        state: what the first update takes; it is donated if `update` donates.
        update: `update(state, batch) -> (state, metrics)`.
        batches: step -> batch; called one step ahead in a thread.
        start: updates that `state` has seen.
        stop: updates after the last one.
        callbacks: called in this order.
    """
    running, shapes, ended = None, set(), 0.0

    def finish(running, ended: float) -> float:
        step, item, metrics, began, waited, compiled = running
        metrics = hosts.gather(metrics)
        now = time.perf_counter()
        done = FinishedUpdate(step, item, metrics, now - max(began, ended), waited, compiled)
        for callback in callbacks:
            callback.on_update(done)
        return now

    with contextlib.closing(prefetch(batches, start, stop)) as ahead:
        for step, (item, waited) in enumerate(ahead, start + 1):
            began, shape = time.perf_counter(), tuple(map(np.shape, jax.tree.leaves(item.batch)))
            state, metrics = update(state, item.batch)
            if running is not None:
                ended = finish(running, ended)
            running = (step, item, metrics, began, waited, shape not in shapes)
            shapes.add(shape)
            if step == stop or any(callback.needs_state(step) for callback in callbacks):
                ended, running = finish(running, ended), None
                last = step == stop or any(callback.ends(step) for callback in callbacks)
                for callback in callbacks:
                    callback.on_state(step, state, last)
                if last:
                    break
    return state
