"""Passes over a buffer: the loop around the update step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from shiq_jax.errors import Refusal
from shiq_jax.training.batches import Batches
from shiq_jax.training.checkpoints import Checkpoints
from shiq_jax.training.metrics import MetricsLog, track
from shiq_jax.training.state import State


class Marks(NamedTuple):
    """When to evaluate and when to save, in steps; the last step always does both."""

    evaluate: int | None = None
    save: int | None = None


def run_passes(
    update: Callable,
    state: State,
    batches: Batches,
    steps: int,
    *,
    stage: str,
    log: MetricsLog,
    checkpoints: Checkpoints,
    metadata: dict[str, Any],
    learning_rate: Callable,
    marks: Marks = Marks(),
    evaluate: Callable[[State, int], dict[str, float]] | None = None,
) -> State:
    """Update from `state.step` to `steps`, logging every step, evaluating and saving at the marks.

    Returns:
        the last state, which is also on disk.

    Raises:
        Refusal: the loss or the gradient is not finite; the message names the step and its records, and the
            checkpoints on disk are those of before.
    """
    start, shapes = int(state.step), set()
    for number, item in enumerate(track(batches.ahead(start, steps), stage, steps - start, "updates"), start):
        began = time.perf_counter()
        state, metrics = update(state, item.batch)
        metrics = jax.device_get(metrics)
        seconds = time.perf_counter() - began
        _check(metrics, stage, number, item.members)
        done = number + 1
        shape = tuple(leaf.shape for leaf in jax.tree.leaves(item.batch))
        timing = {"tokens": item.tokens, "seconds": round(seconds, 4), "compiled": shape not in shapes}
        shapes.add(shape)
        log.write(
            stage, done, **metrics, learning_rate=float(learning_rate(number)), fill=round(item.fill, 4), **timing
        )
        values = {}
        if evaluate and (done == steps or (marks.evaluate and done % marks.evaluate == 0)):
            values = evaluate(state, done)
        # What was evaluated is saved, so that the best policy of the evaluations is one that can be had.
        if done == steps or values or (marks.save and done % marks.save == 0):
            checkpoints.save(state, metadata, values)
    checkpoints.wait()
    return state


def tokens_per_second(rows: Sequence[Mapping]) -> float | None:
    """Real tokens through the update step per second, over the updates that did not compile; None without any."""
    counted = [row for row in rows if not row["compiled"]]
    seconds = sum(row["seconds"] for row in counted)
    return sum(row["tokens"] for row in counted) / seconds if seconds else None


def _check(metrics: dict, stage: str, number: int, members) -> None:
    bad = [name for name in ("loss", "grad_norm") if not math.isfinite(metrics[name])]
    if bad:
        records = sorted({int(index) for index in members.ravel() if index >= 0})
        raise Refusal(
            f"{' and '.join(bad)} of {stage} step {number + 1} (records {records}) is not finite; the last checkpoint "
            "is from before it: lower the learning rate or look at those records"
        )
