"""The training loop and its callback interface."""

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


class UpdateResult(NamedTuple):
    """A finished update, with its metrics on the host.

    Attributes:
        step: number of updates so far, including this one.
        batch: the batch of this update.
        metrics: name -> numpy array, the metrics that the update returned.
        seconds: time from the start of this update, or the end of the previous one if later, to its end.
        wait_seconds: time that the loop waited for the batch.
        compiled: whether this is the first update of this loop with batches of this shape.
    """

    step: int
    batch: DeviceBatch
    metrics: Mapping[str, Any]
    seconds: float
    wait_seconds: float
    compiled: bool


class Callback:
    """Base class of the callbacks of `fit`; every hook does nothing by default."""

    def on_update(self, result: UpdateResult) -> None:
        """Called once per update, while the next one runs."""

    def needs_state(self, step: int) -> bool:
        """Whether to call `on_state` after this update; after the last update it is always called."""
        return False

    def should_stop(self, step: int) -> bool:
        """Whether to stop after this update; called only if some callback needs the state."""
        return False

    def on_state(self, step: int, state: State, last: bool) -> None:
        """Called with the state after an update, before the next update may reuse its buffers."""


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

    The metrics of an update are fetched after the next update is dispatched, so the device does not wait for the host.
    If a callback needs the state, the metrics are fetched before `on_state`, so a callback that raises in `on_update`
    prevents that state from being saved.

    Args:
        state: initial state; donated if `update` donates.
        update: `update(state, batch) -> (state, metrics)`.
        batches: step -> batch; called one step ahead in a thread.
        start: number of updates already applied to `state`.
        stop: total number of updates.
        callbacks: called in this order.
    """
    pending, shapes, previous_end = None, set(), 0.0

    def finish(pending, previous_end: float) -> float:
        step, batch, metrics, start_time, wait_seconds, compiled = pending
        metrics = hosts.gather(metrics)
        now = time.perf_counter()
        result = UpdateResult(step, batch, metrics, now - max(start_time, previous_end), wait_seconds, compiled)
        for callback in callbacks:
            callback.on_update(result)
        return now

    with contextlib.closing(prefetch(batches, start, stop)) as prefetched:
        for step, (batch, wait_seconds) in enumerate(prefetched, start + 1):
            start_time, shape = time.perf_counter(), tuple(map(np.shape, jax.tree.leaves(batch.batch)))
            state, metrics = update(state, batch.batch)
            if pending is not None:
                previous_end = finish(pending, previous_end)
            pending = (step, batch, metrics, start_time, wait_seconds, shape not in shapes)
            shapes.add(shape)
            if step == stop or any(callback.needs_state(step) for callback in callbacks):
                previous_end, pending = finish(pending, previous_end), None
                last = step == stop or any(callback.should_stop(step) for callback in callbacks)
                for callback in callbacks:
                    callback.on_state(step, state, last)
                if last:
                    break
    return state
