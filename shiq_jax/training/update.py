"""The update step: forward pass over packed rows, token statistics, objective, gradient, optimizer."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array

from shiq_jax.models.accumulation import accumulate_into
from shiq_jax.objectives import Objective
from shiq_jax.privacy import Mechanism
from shiq_jax.replay import Batch
from shiq_jax.sharding import constrain
from shiq_jax.training.examples import combine_summaries, coupling_summaries, summed_loss
from shiq_jax.training.private_gradient import check_private, private_gradient
from shiq_jax.training.state import State, merge, polyak_average


def make_update(
    model,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    *,
    mesh: Mesh | None = None,
    privacy: Mechanism | None = None,
    microbatches: int = 1,
    donate: bool = True,
    method: str = "auto",
    return_unit_metrics: bool = False,
) -> Callable[..., tuple[State, dict[str, Array]]]:
    """A pure, jitted `update(state, batch) -> (state, metrics)`, sharded over the mesh if there is one.

    The loss is `sum(value) / sum(weight)` over the global batch, so neither it nor the gradient depends on how the
    batch is split into microbatches, rows or devices. The state is donated: use the returned one.

    Args:
        model: provides `hidden` and `token_stats`, and for objectives with heads `head_values`
            (`models.ModelWithHeads`).
        objective: per-example loss; see `shiq_jax.objectives.OBJECTIVES`.
        optimizer: any optax transformation; it receives the gradient of the global mean.
        mesh: mesh of the state; by default `model.mesh`.
        privacy: clips per-unit gradients and adds noise. The update then needs the secret root key,
            `update(state, batch, private_key=key)`, and each row of the batch holds one unit. With
            `public=batch, public_weight=alpha` it uses alpha times the gradient of that public batch plus 1 - alpha
            times the private gradient.
        microbatches: number of equal slices of the rows, processed sequentially; must divide the rows.
        donate: donate the state's buffers.
        method: clipping method, see `shiq_jax.privacy.clipped_sum`.
        return_unit_metrics: also return per-unit losses and gradient norms, which the privacy accounting does not
            cover.

    Returns:
        `update`. Its metrics are scalars: `loss`, `weight`, `grad_norm`, `param_norm` after the update, and the means
        of the objective's metrics. A private update returns only `grad_norm` of the private gradient and `param_norm`,
        and with `return_unit_metrics` also `private/loss` and `private/norm`, [units].

    Raises:
        ValueError: the update is private and the objective couples the examples of a batch.
    """
    mesh = mesh if mesh is not None else model.mesh
    if privacy is not None:
        check_private(objective)

    @jax.named_scope("optimizer")
    def step(state: State, grads, metrics):
        updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        norms = {"grad_norm": optax.tree.norm(grads), "param_norm": optax.tree.norm(trainable)}
        targets = polyak_average(state.targets, trainable, objective.polyak)
        state = state._replace(trainable=trainable, targets=targets, opt_state=opt_state, step=state.step + 1)
        return state, norms | metrics

    def private_update(
        state: State, batch: Batch, private_key: Array, public: Batch | None = None, public_weight: Array | float = 0
    ):
        slices = _slices(batch, microbatches, mesh)
        grads, unit_metrics = private_gradient(model, objective, state, slices, privacy, private_key, method)
        if public is not None:
            *_, public_grads = _gradient(model, objective, state, _slices(public, 1, mesh))
            mix = lambda public_leaf, leaf: public_weight * public_leaf + (1 - public_weight) * leaf  # noqa: E731
            grads = jax.tree.map(mix, public_grads, grads)
        metrics = {f"private/{name}": leaf for name, leaf in unit_metrics.items()} if return_unit_metrics else {}
        return step(state, grads, metrics)

    def update(state: State, batch: Batch):
        loss, weight, metrics, grads = _gradient(model, objective, state, _slices(batch, microbatches, mesh))
        return step(state, grads, {"loss": loss, "weight": weight} | metrics)

    return jax.jit(update if privacy is None else private_update, donate_argnums=0 if donate else ())


def _gradient(model, objective: Objective, state: State, slices: Batch):
    """Loss, weight, metrics and gradient of the mean over the global batch; leading axis of `slices`: microbatches."""
    inputs = slices, _coupled(model, objective, state, slices) if objective.couple else None
    if len(slices.tokens) > 1:
        return _accumulated_mean(model, objective, state, inputs)
    return _mean(model, objective, state, jax.tree.map(lambda leaf: leaf[0], inputs))


def _mean(model, objective: Objective, state: State, inputs):
    """Loss, weight, metrics and gradient of the mean, without microbatches."""

    def mean(trainable):
        # Divide the value rather than the gradient, which would be written twice.
        value, weight, metrics = summed_loss(model, objective, merge(trainable, state.frozen), *inputs, state.targets)
        return value / _denominator(weight), (weight, metrics)

    (loss, (weight, metrics)), grads = jax.value_and_grad(mean, has_aux=True)(state.trainable)
    return loss, weight, jax.tree.map(lambda total: total / _denominator(weight), metrics), grads


def _accumulated_mean(model, objective: Objective, state: State, inputs):
    """Loss, weight, metrics and gradient of the mean, accumulated over microbatches in a single gradient buffer."""

    def sums(trainable, microbatch, grad_sum):
        accumulating, trainable = accumulate_into(model, trainable, grad_sum)
        out = summed_loss(accumulating, objective, merge(trainable, state.frozen), *microbatch, state.targets)
        return out.value, out

    def add(carry, microbatch):
        totals, grad_sum = carry
        grad_sum, out = jax.grad(sums, has_aux=True)(state.trainable, microbatch, grad_sum)
        return (jax.tree.map(jnp.add, totals, out), grad_sum), None

    first = jax.tree.map(lambda leaf: leaf[0], inputs)
    shapes = jax.eval_shape(sums, state.trainable, first, state.trainable)[1]
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    ((value, weight, metrics), grads), _ = jax.lax.scan(add, (zeros, optax.tree.zeros_like(state.trainable)), inputs)
    loss, metrics, grads = jax.tree.map(
        lambda total: total / _denominator(weight).astype(total.dtype), (value, metrics, grads)
    )
    return loss, weight, metrics, grads


def _coupled(model, objective: Objective, state: State, slices: Batch):
    """`Example.coupled` of every microbatch: a forward pass whose summaries are combined over the global batch."""
    summaries = jax.lax.map(
        lambda batch: coupling_summaries(model, objective, state.params(), batch, state.targets), slices
    )
    return combine_summaries(objective.couple, summaries, slices.real)


def _denominator(weight):
    """Denominator of the means; 1 for a batch of weight 0, whose gradient is then 0 instead of NaN."""
    return jnp.where(weight > 0, weight, 1)


def _slices(batch: Batch, microbatches: int, mesh: Mesh | None) -> Batch:
    """`[rows, ...] -> [microbatches, rows / microbatches, ...]`; every slice has rows from every device."""
    rows = batch.tokens.shape[0]
    if rows % microbatches:
        raise ValueError(f"{rows} rows cannot be split into {microbatches} equal microbatches: pack with rows_multiple")

    def split(leaf):
        leaf = leaf.reshape(rows // microbatches, microbatches, *leaf.shape[1:]).swapaxes(0, 1)
        return constrain(leaf, (None, "rows", *(None,) * (leaf.ndim - 2)), mesh)

    return jax.tree.map(split, batch)
