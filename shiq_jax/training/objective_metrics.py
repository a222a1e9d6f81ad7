"""An objective's loss and metrics on a buffer, without learning from it."""

from __future__ import annotations

import functools

import jax
import numpy as np

from shiq_jax.errors import Refusal
from shiq_jax.objectives import Objective
from shiq_jax.progress import track
from shiq_jax.replay import Buffer, bundles, pack, plan
from shiq_jax.training.examples import objective_sums
from shiq_jax.training.placement import data_devices, place


def objective_metrics(
    model,
    params,
    objective: Objective,
    buffer: Buffer,
    statistics=None,
    *,
    prompts_per_batch: int = 32,
    row_length: int = 4096,
) -> dict[str, float]:
    """`loss` and the objective's metrics as means over a whole buffer, each example once.

    Args:
        model, params: the policy.
        objective: one that does not couple examples.
        buffer: the records.
        statistics: reader of the reference's statistics, where the objective needs them.
        prompts_per_batch: bundles in one compiled call.
        row_length: larger groups of trajectories are split.

    Raises:
        Refusal: the buffer has no example of the objective's unit.
        ValueError: the objective couples examples.
    """
    if objective.couple is not None:
        raise ValueError(
            "an objective that couples examples has no value on a part of them: measure it in the update step"
        )
    chosen = bundles(buffer, objective.unit, row_length=row_length)
    if not chosen:
        raise Refusal(f"{buffer.path} holds no {objective.unit} to measure")
    shape = plan(buffer, chosen)
    sums = jax.jit(functools.partial(objective_sums, model, objective))
    totals = []
    starts = range(0, len(chosen), prompts_per_batch)
    for start in track(starts, "objective's metrics", len(starts), "batches"):
        piece = chosen[start : start + prompts_per_batch]
        packed = pack(piece, buffer, statistics, shape, rows_multiple=data_devices(model.mesh))
        totals.append(jax.device_get(sums(params, place(packed.batch, model.mesh))))
    value, weight, metrics = jax.tree.map(lambda *parts: float(np.sum(parts)), *totals)
    return {"loss": value / weight} | {name: total / weight for name, total in metrics.items()}
