"""The update step: forward over packed rows, statistics of actions, objective, gradient, optimiser."""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from shiq_jax.models.heads import HEADS
from shiq_jax.objectives import Couple, Example, LossOut, Objective, TokenStats
from shiq_jax.replay import Batch
from shiq_jax.sharding import constrain
from shiq_jax.training.state import Params, State, follow, merge


def take(values: Float[Array, "rows A"], gather: Int[Array, "rows slots K T"]) -> Float[Array, "rows slots K T"]:
    """Row-local lookup of per-action floats; padding (-1) reads 0."""
    flat = gather.reshape(gather.shape[0], -1)
    taken = jnp.take_along_axis(values, jnp.maximum(flat, 0), axis=1).reshape(gather.shape)
    return jnp.where(gather >= 0, taken, 0)


def policy_statistics(model, params: Params, batch: Batch, extra: tuple[str, ...] = ()) -> TokenStats:
    """Statistics of every action, `[rows, slots, K, T]`, each distinct action of a row computed once."""
    stats = model.token_stats(params, _predicting(model, params, batch), batch.targets, extra=extra)
    return jax.tree.map(lambda values: take(values, batch.gather), stats)


def objective_sums(
    model, objective: Objective, params: Params, batch: Batch, coupled=None, targets: Params = MappingProxyType({})
) -> LossOut:
    """Value, weight and metrics of an objective, each summed over the real examples of a batch.

    targets: slow copies of the heads that it reads, as `State` holds them.
    """
    examples = _examples(model, objective, params, targets, batch, coupled)
    out: LossOut = jax.vmap(jax.vmap(objective.loss))(examples)
    return jax.tree.map(lambda values: jnp.sum(jnp.where(batch.real, values, 0)), out)


def summaries(model, objective: Objective, params: Params, batch: Batch, targets: Params = MappingProxyType({})) -> Any:
    """What an objective that couples examples has to know of each, leading axes [rows, slots]."""
    return jax.vmap(jax.vmap(objective.couple.summary))(_examples(model, objective, params, targets, batch, None))


def combined(couple: Couple, found: Any, real: Bool[Array, "..."]) -> Any:
    """What comes of the summaries of all examples of a batch, for each of them, without gradient.

    found: summaries with the leading axes of `real`, whatever these are; so has the result.
    """
    lead = real.shape
    flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[len(lead) :]), found)
    out = couple.combine(flat, real.reshape(-1).astype(jnp.float32))
    return jax.lax.stop_gradient(jax.tree.map(lambda leaf: leaf.reshape(*lead, *leaf.shape[1:]), out))


def _examples(model, objective: Objective, params: Params, targets: Params, batch: Batch, coupled) -> Example:
    predicting = _predicting(model, params, batch)
    policy = model.token_stats(params, predicting, batch.targets) if objective.policy else None
    values = None
    if objective.heads:
        # To the heads the hidden states are data: what they learn does not move the policy.
        seen = jax.lax.stop_gradient(predicting)
        values = model.head_values({name: params[HEADS][name] for name in objective.heads}, seen, batch.targets)
        slow = {name: targets[HEADS][name] for name in objective.slow}
        values |= {f"target_{name}": said for name, said in model.head_values(slow, seen, batch.targets).items()}
    policy, values = jax.tree.map(lambda leaf: take(leaf, batch.gather), (policy, values))
    return batch.example._replace(policy=policy, values=values, coupled=coupled)


def _predicting(model, params: Params, batch: Batch) -> Float[Array, "rows A features"]:
    hidden = model.hidden(params, batch.tokens, batch.positions, batch.intervals)
    return jnp.take_along_axis(hidden, batch.predictors[..., None], axis=1)


def make_update(
    model,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    *,
    mesh: Mesh | None = None,
    microbatches: int = 1,
    donate: bool = True,
) -> Callable[[State, Batch], tuple[State, dict[str, Array]]]:
    """A pure, jitted `update(state, batch) -> (state, metrics)`, sharded when there is a mesh.

    The loss is `sum(value) / sum(weight)` over the global batch, so neither it nor the gradient depends on how the
    batch is cut into microbatches, rows or devices. The state is donated: use the returned one.

    Args:
        model: gives `hidden` and `token_stats`, and `head_values` to objectives with heads (`models.Headed`); its mesh
            is used when `mesh` is not given.
        objective: per-example loss; see `shiq_jax.objectives.OBJECTIVES`.
        optimizer: any optax transformation; it sees the gradient of the global mean.
        microbatches: number of equal slices of the rows that are run one after the other; divides the rows.
        donate: give the old state's memory to the new one.

    Returns:
        `update`; its metrics are scalars: `loss`, `weight`, `grad_norm`, `param_norm` after the update, and the
        objective's own means.
    """
    mesh = mesh if mesh is not None else model.mesh

    def sums(trainable, state: State, batch: Batch, coupled):
        params = merge(trainable, state.frozen)
        value, *others = objective_sums(model, objective, params, batch, coupled, state.targets)
        return value, tuple(others)

    def couple(state: State, slices: Batch):
        """Forward only: summaries of all microbatches, combined over the global batch, cut back to the slices."""
        found = jax.lax.map(lambda batch: summaries(model, objective, state.params(), batch, state.targets), slices)
        return combined(objective.couple, found, slices.real)

    def update(state: State, batch: Batch):
        slices = _slices(batch, microbatches, mesh)
        coupled = couple(state, slices) if objective.couple else None
        pieces = (slices, coupled)

        def sums_of(piece):
            return jax.value_and_grad(sums, has_aux=True)(state.trainable, state, *piece)

        def means_of(piece):
            """The same of the mean: a gradient that is born divided is not written twice."""

            def mean(trainable):
                value, (weight, metrics) = sums(trainable, state, *piece)
                return value / _count(weight), (weight, metrics)

            return jax.value_and_grad(mean, has_aux=True)(state.trainable)

        if microbatches == 1:
            (loss, (weight, metrics)), grads = means_of(jax.tree.map(lambda leaf: leaf[0], pieces))
        else:
            shapes = jax.eval_shape(sums_of, jax.tree.map(lambda leaf: leaf[0], pieces))
            zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
            totals, _ = jax.lax.scan(
                lambda sum_, piece: (jax.tree.map(jnp.add, sum_, sums_of(piece)), None), zeros, pieces
            )
            (value, (weight, metrics)), grads = totals
            loss, grads = jax.tree.map(lambda leaf: leaf / _count(weight).astype(leaf.dtype), (value, grads))
        metrics = jax.tree.map(lambda total: total / _count(weight), metrics)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        norms = {"grad_norm": optax.tree.norm(grads), "param_norm": optax.tree.norm(trainable)}
        metrics = {"loss": loss, "weight": weight, **norms, **metrics}
        targets = follow(state.targets, trainable, objective.polyak)
        state = state._replace(trainable=trainable, targets=targets, opt_state=opt_state, step=state.step + 1)
        return state, metrics

    return jax.jit(update, donate_argnums=0 if donate else ())


def _count(weight):
    """What sums are divided by: a batch without any weight leaves the parameters to the optimiser's own decay."""
    return jnp.where(weight > 0, weight, 1)


def _slices(batch: Batch, microbatches: int, mesh: Mesh | None) -> Batch:
    """`[rows, ...] -> [microbatches, rows / microbatches, ...]`, each device keeping a share of its rows in each."""
    rows = batch.tokens.shape[0]
    if rows % microbatches:
        raise ValueError(f"{rows} rows cannot be cut into {microbatches} equal microbatches: pack with rows_multiple")

    def cut(leaf):
        leaf = leaf.reshape(rows // microbatches, microbatches, *leaf.shape[1:]).swapaxes(0, 1)
        return constrain(leaf, (None, "rows", *(None,) * (leaf.ndim - 2)), mesh)

    return jax.tree.map(cut, batch)
