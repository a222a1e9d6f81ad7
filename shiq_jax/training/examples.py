"""From a batch and a model to the examples that an objective sees, and their sums."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from shiq_jax.models.heads import HEADS
from shiq_jax.objectives import Couple, Example, LossOut, Objective, TokenStats
from shiq_jax.replay import Batch
from shiq_jax.training.state import Params

NOTHING: Params = MappingProxyType({})


def gather_actions(
    values: Float[Array, "rows A"], gather: Int[Array, "rows slots K T"]
) -> Float[Array, "rows slots K T"]:
    """Row-local lookup of per-action floats; padding (-1) reads 0."""
    flat = gather.reshape(gather.shape[0], -1)
    taken = jnp.take_along_axis(values, jnp.maximum(flat, 0), axis=1).reshape(gather.shape)
    return jnp.where(gather >= 0, taken, 0)


def policy_statistics(model, params: Params, batch: Batch, extra: tuple[str, ...] = ()) -> TokenStats:
    """Statistics of every action, `[rows, slots, K, T]`, each distinct action of a row computed once."""
    hidden = model.hidden(params, batch.tokens, batch.positions, batch.intervals)
    stats = model.token_stats(params, _at_actions(hidden, batch), batch.targets, extra=extra)
    return jax.tree.map(lambda values: gather_actions(values, batch.gather), stats)


def objective_sums(
    model, objective: Objective, params: Params, batch: Batch, coupled=None, targets: Params = NOTHING
) -> LossOut:
    """Value, weight and metrics of an objective, each summed over the real examples of a batch.

    targets: slow copies of the heads that it reads, as `State` holds them.
    """
    examples = build_examples(model, objective, params, targets, batch, coupled)
    return jax.tree.map(jnp.sum, example_losses(objective, examples, batch.real))


@jax.named_scope("objective")
def example_losses(objective: Objective, examples: Example, real: Bool[Array, "rows slots"]) -> LossOut:
    """The loss of every example, `[rows, slots]`; 0 where there is none."""
    out: LossOut = jax.vmap(jax.vmap(objective.loss))(examples)
    return jax.tree.map(lambda values: jnp.where(real, values, 0), out)


def summaries(model, objective: Objective, params: Params, batch: Batch, targets: Params = NOTHING) -> Any:
    """What an objective that couples examples has to know of each, leading axes [rows, slots]."""
    return jax.vmap(jax.vmap(objective.couple.summary))(build_examples(model, objective, params, targets, batch))


def combine_summaries(couple: Couple, found: Any, real: Bool[Array, "..."]) -> Any:
    """What comes of the summaries of all examples of a batch, for each of them, without gradient.

    found: summaries with the leading axes of `real`, whatever these are; so has the result.
    """
    lead = real.shape
    flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[len(lead) :]), found)
    out = couple.combine(flat, real.reshape(-1).astype(jnp.float32))
    return jax.lax.stop_gradient(jax.tree.map(lambda leaf: leaf.reshape(*lead, *leaf.shape[1:]), out))


def build_examples(model, objective: Objective, params: Params, targets: Params, batch: Batch, coupled=None) -> Example:
    """The examples of a batch, leading axes [rows, slots], as an objective sees them."""
    hidden = model.hidden(params, batch.tokens, batch.positions, batch.intervals)
    predicting = _at_actions(hidden, batch)
    policy = None
    if objective.trains_policy:
        policy = model.token_stats(params, predicting, batch.targets, extra=objective.extra_stats)
    values = None
    if objective.heads:
        # To the heads the hidden states are data: what they learn does not move the policy.
        seen = jax.lax.stop_gradient(predicting)
        values = model.head_values({name: params[HEADS][name] for name in objective.heads}, seen, batch.targets)
        slow = {name: targets[HEADS][name] for name in objective.target_heads}
        values |= {f"target_{name}": said for name, said in model.head_values(slow, seen, batch.targets).items()}
    policy, values = jax.tree.map(lambda leaf: gather_actions(leaf, batch.gather), (policy, values))
    return batch.example._replace(policy=policy, values=values, coupled=coupled)


def _at_actions(hidden: Float[Array, "rows L features"], batch: Batch) -> Float[Array, "rows A features"]:
    return jnp.take_along_axis(hidden, batch.predictors[..., None], axis=1)
