"""The update step: forward over packed rows, statistics of actions, objective, gradient, optimiser."""

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
from shiq_jax.training.examples import combine_summaries, objective_sums, summaries
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
    reveal: bool = False,
) -> Callable[..., tuple[State, dict[str, Array]]]:
    """A pure, jitted `update(state, batch) -> (state, metrics)`, sharded when there is a mesh.

    The loss is `sum(value) / sum(weight)` over the global batch, so neither it nor the gradient depends on how the
    batch is cut into microbatches, rows or devices. The state is donated: use the returned one.

    Args:
        model: gives `hidden` and `token_stats`, and `head_values` to objectives with heads (`models.ModelWithHeads`); its mesh
            is used when `mesh` is not given.
        objective: per-example loss; see `shiq_jax.objectives.OBJECTIVES`.
        optimizer: any optax transformation; it sees the gradient of the global mean.
        privacy: clips the gradient of every example by itself and adds noise; the update is then called with the secret
            root key as well, `update(state, batch, private_key=key)`, and each row of the batch holds one example. With
            `public=batch, public_weight=alpha` it takes alpha times the gradient of that batch, which is not private,
            and 1 - alpha times the private one.
        microbatches: number of equal slices of the rows that are run one after the other; divides the rows.
        donate: give the old state's memory to the new one.
        method: of clipping, see `shiq_jax.privacy.clipped_sum`.
        reveal: also return the units' losses and gradient norms, which nobody accounts for.

    Returns:
        `update`; its metrics are scalars: `loss`, `weight`, `grad_norm`, `param_norm` after the update, and the
        objective's own means. A private one has the two norms alone, of what has been made private, and with `reveal`
        `private/loss` and `private/norm`, [units].

    Raises:
        ValueError: a private update of an objective that couples the examples of a batch.
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
        grads, secret = private_gradient(model, objective, state, slices, privacy, private_key, method)
        if public is not None:
            *_, known = _gradient(model, objective, state, _slices(public, 1, mesh))
            grads = jax.tree.map(lambda ours, own: public_weight * ours + (1 - public_weight) * own, known, grads)
        return step(state, grads, {f"private/{name}": leaf for name, leaf in secret.items()} if reveal else {})

    def update(state: State, batch: Batch):
        loss, weight, metrics, grads = _gradient(model, objective, state, _slices(batch, microbatches, mesh))
        return step(state, grads, {"loss": loss, "weight": weight} | metrics)

    return jax.jit(update if privacy is None else private_update, donate_argnums=0 if donate else ())


def _gradient(model, objective: Objective, state: State, slices: Batch):
    """Loss, weight, metrics and gradient of the mean over slices that are run one after the other."""
    pieces = slices, _coupled(model, objective, state, slices) if objective.couple else None
    if len(slices.tokens) > 1:
        return _accumulated_mean(model, objective, state, pieces)
    return _mean(model, objective, state, jax.tree.map(lambda leaf: leaf[0], pieces))


def _mean(model, objective: Objective, state: State, piece):
    """Loss, weight, metrics and gradient of the mean over a batch that is run at once."""

    def mean(trainable):
        # Divided here, and not the gradient, which would be written twice.
        value, weight, metrics = objective_sums(model, objective, merge(trainable, state.frozen), *piece, state.targets)
        return value / _count(weight), (weight, metrics)

    (loss, (weight, metrics)), grads = jax.value_and_grad(mean, has_aux=True)(state.trainable)
    return loss, weight, jax.tree.map(lambda total: total / _count(weight), metrics), grads


def _accumulated_mean(model, objective: Objective, state: State, pieces):
    """The same over microbatches, one after the other; there is one array of gradients, to which each adds its own."""

    def sums(trainable, piece, before):
        adding, trainable = accumulate_into(model, trainable, before)
        found = objective_sums(adding, objective, merge(trainable, state.frozen), *piece, state.targets)
        return found.value, found

    def add(totals, piece):
        found, before = totals
        grads, more = jax.grad(sums, has_aux=True)(state.trainable, piece, before)
        return (jax.tree.map(jnp.add, found, more), grads), None

    first = jax.tree.map(lambda leaf: leaf[0], pieces)
    shapes = jax.eval_shape(sums, state.trainable, first, state.trainable)[1]
    nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    ((value, weight, metrics), grads), _ = jax.lax.scan(add, (nothing, optax.tree.zeros_like(state.trainable)), pieces)
    loss, metrics, grads = jax.tree.map(
        lambda total: total / _count(weight).astype(total.dtype), (value, metrics, grads)
    )
    return loss, weight, metrics, grads


def _coupled(model, objective: Objective, state: State, slices: Batch):
    """Forward only: summaries of all microbatches, combined over the global batch, cut back to the slices."""
    found = jax.lax.map(lambda batch: summaries(model, objective, state.params(), batch, state.targets), slices)
    return combine_summaries(objective.couple, found, slices.real)


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
