"""Build an objective's examples from a batch and a model, and sum their losses."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from shiq_jax.models.heads import HEADS
from shiq_jax.objectives import Couple, Example, LossOut, Objective, TokenStats
from shiq_jax.replay import Batch
from shiq_jax.training.state import Params

NO_TARGETS: Params = MappingProxyType({})


def gather_actions(
    values: Float[Array, "rows A"], gather: Int[Array, "rows slots K T"]
) -> Float[Array, "rows slots K T"]:
    """Row-local gather of per-action values; padding (-1) gives 0."""
    chex.assert_rank((values, gather), (2, 4))
    chex.assert_equal_shape_prefix((values, gather), 1)
    flat = gather.reshape(gather.shape[0], -1)
    taken = jnp.take_along_axis(values, jnp.maximum(flat, 0), axis=1).reshape(gather.shape)
    return jnp.where(gather >= 0, taken, 0)


def policy_statistics(model, params: Params, batch: Batch, extra: tuple[str, ...] = ()) -> TokenStats:
    """Token statistics of every action, `[rows, slots, K, T]`; each distinct action of a row is computed once."""
    hidden = model.hidden(params, batch.tokens, batch.positions, batch.intervals)
    with jax.named_scope("statistics"):
        stats = model.token_stats(params, _at_actions(hidden, batch), batch.targets, extra=extra)
        return jax.tree.map(lambda values: gather_actions(values, batch.gather), stats)


def summed_loss(
    model, objective: Objective, params: Params, batch: Batch, coupled=None, targets: Params = NO_TARGETS
) -> LossOut:
    """Value, weight and metrics of an objective, each summed over the real examples of a batch.

    targets: `State.targets`, the Polyak-averaged heads that the objective reads.
    """
    examples = build_examples(model, objective, params, targets, batch, coupled)
    return jax.tree.map(jnp.sum, example_losses(objective, examples, batch.real))


@jax.named_scope("objective")
def example_losses(objective: Objective, examples: Example, real: Bool[Array, "rows slots"]) -> LossOut:
    """The loss of every example, `[rows, slots]`; 0 for padding."""
    out: LossOut = jax.vmap(jax.vmap(objective.loss))(examples)
    return jax.tree.map(lambda values: jnp.where(real, values, 0), out)


def coupling_summaries(model, objective: Objective, params: Params, batch: Batch, targets: Params = NO_TARGETS) -> Any:
    """`objective.couple.summary` of every example, leading axes [rows, slots]."""
    return jax.vmap(jax.vmap(objective.couple.summary))(build_examples(model, objective, params, targets, batch))


def combine_summaries(couple: Couple, summaries: Any, real: Bool[Array, "..."]) -> Any:
    """Apply `couple.combine` to the summaries of all examples of a batch; no gradient flows through the result.

    summaries: any leading axes, equal to the shape of `real`; the result has the same leading axes.
    """
    leading = real.shape
    flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[len(leading) :]), summaries)
    combined = couple.combine(flat, real.reshape(-1).astype(jnp.float32))
    return jax.lax.stop_gradient(jax.tree.map(lambda leaf: leaf.reshape(*leading, *leaf.shape[1:]), combined))


def build_examples(model, objective: Objective, params: Params, targets: Params, batch: Batch, coupled=None) -> Example:
    """The examples of a batch with the statistics that the objective reads, leading axes [rows, slots]."""
    hidden = model.hidden(params, batch.tokens, batch.positions, batch.intervals)
    with jax.named_scope("statistics"):
        predicting = _at_actions(hidden, batch)
        policy = None
        if objective.trains_policy:
            policy = model.token_stats(params, predicting, batch.targets, extra=objective.extra_stats)
        values = None
        if objective.heads:
            # The losses of the heads must not change the policy.
            features = jax.lax.stop_gradient(predicting)
            heads = {name: params[HEADS][name] for name in objective.heads}
            target_heads = {name: targets[HEADS][name] for name in objective.target_heads}
            values = model.head_values(heads, features, batch.targets)
            target_values = model.head_values(target_heads, features, batch.targets)
            values |= {f"target_{name}": value for name, value in target_values.items()}
        policy, values = jax.tree.map(lambda leaf: gather_actions(leaf, batch.gather), (policy, values))
    return batch.example._replace(policy=policy, values=values, coupled=coupled)


def _at_actions(hidden: Float[Array, "rows L features"], batch: Batch) -> Float[Array, "rows A features"]:
    return jnp.take_along_axis(hidden, batch.predictors[..., None], axis=1)
