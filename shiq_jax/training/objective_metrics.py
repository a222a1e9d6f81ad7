"""An objective's loss and metrics on a buffer, without learning from it."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator

import jax
import numpy as np

from shiq_jax.errors import UserError
from shiq_jax.objectives import Objective
from shiq_jax.progress import track
from shiq_jax.replay import NO_REFERENCES, Batch, Buffer, References, Trees, pack, pack_groups, plan
from shiq_jax.sharding import hosts
from shiq_jax.training.examples import combine_summaries, objective_sums, summaries
from shiq_jax.training.placement import data_devices, place


def objective_metrics(
    model,
    params,
    objective: Objective,
    buffer: Buffer,
    references: References = NO_REFERENCES,
    *,
    prompts_per_batch: int = 32,
    row_length: int = 4096,
) -> dict[str, float]:
    """`loss` and the objective's metrics as means over a whole buffer, each example once.

    Examples that know of each other know of all in the buffer: it counts as one batch.

    Args:
        model, params: the policy.
        objective: any that has no heads with slow copies.
        buffer: the records.
        references: by name, the statistics that fill `Example.references`.
        prompts_per_batch: pack_groups in one compiled call.
        row_length: larger groups of trajectories are split.

    Raises:
        UserError: the buffer has no example of the objective's unit.
    """
    chosen = pack_groups(buffer, objective.unit, row_length=row_length)
    if not chosen:
        raise UserError(f"{buffer.path} holds no {objective.unit} to measure")
    trees = Trees(buffer)
    shape = plan(trees, chosen)
    starts = range(0, len(chosen), prompts_per_batch)

    def batches(purpose: str) -> Iterator[Batch]:
        for start in track(starts, purpose, len(starts), "batches"):
            piece = chosen[start : start + prompts_per_batch]
            yield pack(piece, trees, shape, references=references, rows_multiple=data_devices(model.mesh)).batch

    coupled = itertools.repeat(None)
    if objective.couple is not None:
        coupled = _coupled(model, params, objective, batches("what examples know of each other"))
    sums = jax.jit(functools.partial(objective_sums, model, objective))
    totals = [
        hosts.gather(sums(params, place(batch, model.mesh), place(known, model.mesh)))
        for batch, known in zip(batches("objective's metrics"), coupled, strict=False)
    ]
    value, weight, metrics = jax.tree.map(lambda *parts: float(np.sum(parts)), *totals)
    return {"loss": value / weight} | {name: total / weight for name, total in metrics.items()}


def _coupled(model, params, objective: Objective, batches: Iterable[Batch]) -> list:
    """For each batch what its examples know of those of all batches."""
    summarise = jax.jit(functools.partial(summaries, model, objective))
    found, reals = [], []
    for batch in batches:
        found.append(hosts.gather(summarise(params, place(batch, model.mesh))))
        reals.append(batch.real)

    def flat(*leaves):
        return np.concatenate([leaf.reshape(-1, *leaf.shape[2:]) for leaf in leaves])

    known = hosts.gather(combine_summaries(objective.couple, jax.tree.map(flat, *found), flat(*reals)))
    ends = np.cumsum([real.size for real in reals])
    return [
        jax.tree.map(lambda leaf: leaf[end - real.size : end].reshape(*real.shape, *leaf.shape[1:]), known)
        for real, end in zip(reals, ends, strict=True)
    ]
