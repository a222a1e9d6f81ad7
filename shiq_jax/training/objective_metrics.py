"""Evaluate an objective's loss and metrics on a buffer."""

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
from shiq_jax.training.examples import combine_summaries, coupling_summaries, summed_loss
from shiq_jax.training.placement import data_parallel_size, shard_batch


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
    """`loss` and the objective's metrics, averaged over all examples of a buffer.

    An objective that couples examples treats the whole buffer as one batch.

    Args:
        model, params: the policy.
        objective: any objective without target heads.
        buffer: the records.
        references: name -> statistics, for `Example.references`.
        prompts_per_batch: pack groups per compiled call.
        row_length: groups of trajectories with more tokens are split.

    Raises:
        UserError: the buffer has no example of the objective's unit.
    """
    groups = pack_groups(buffer, objective.unit, row_length=row_length)
    if not groups:
        raise UserError(f"{buffer.path} holds no {objective.unit}, so {objective.unit} metrics cannot be computed")
    trees = Trees(buffer)
    shape = plan(trees, groups)
    starts = range(0, len(groups), prompts_per_batch)

    def batches(description: str) -> Iterator[Batch]:
        for start in track(starts, description, len(starts), "batches"):
            chunk = groups[start : start + prompts_per_batch]
            rows_multiple = data_parallel_size(model.mesh)
            yield pack(chunk, trees, shape, references=references, rows_multiple=rows_multiple).batch

    coupled = itertools.repeat(None)
    if objective.couple is not None:
        coupled = _coupled(model, params, objective, batches("coupling summaries"))
    compute_sums = jax.jit(functools.partial(summed_loss, model, objective))
    totals = [
        hosts.gather(compute_sums(params, shard_batch(batch, model.mesh), shard_batch(batch_coupled, model.mesh)))
        for batch, batch_coupled in zip(batches("objective metrics"), coupled, strict=False)
    ]
    value, weight, metrics = jax.tree.map(lambda *sums: float(np.sum(sums)), *totals)
    return {"loss": value / weight} | {name: total / weight for name, total in metrics.items()}


def _coupled(model, params, objective: Objective, batches: Iterable[Batch]) -> list:
    """`Example.coupled` for each batch, combined over the examples of all batches."""
    summarize = jax.jit(functools.partial(coupling_summaries, model, objective))
    summaries, masks = [], []
    for batch in batches:
        summaries.append(hosts.gather(summarize(params, shard_batch(batch, model.mesh))))
        masks.append(batch.real)

    def concatenate(*leaves):
        return np.concatenate([leaf.reshape(-1, *leaf.shape[2:]) for leaf in leaves])

    combined = hosts.gather(
        combine_summaries(objective.couple, jax.tree.map(concatenate, *summaries), concatenate(*masks))
    )
    ends = np.cumsum([real.size for real in masks])
    return [
        jax.tree.map(lambda leaf: leaf[end - real.size : end].reshape(*real.shape, *leaf.shape[1:]), combined)
        for real, end in zip(masks, ends, strict=True)
    ]
