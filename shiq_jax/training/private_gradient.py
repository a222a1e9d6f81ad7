"""The private gradient: noisy mean of clipped per-unit gradients."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from shiq_jax.models.accumulation import accumulate_into
from shiq_jax.models.ghost_norms import NormTracker
from shiq_jax.objectives import Objective
from shiq_jax.privacy import Mechanism, clipped_sum, privatize
from shiq_jax.replay import Batch
from shiq_jax.training.examples import build_examples, example_losses
from shiq_jax.training.placement import data_parallel_size
from shiq_jax.training.state import Params, State, merge


@dataclasses.dataclass(frozen=True, eq=False)
class UnitLosses:
    """Per-unit losses of a batch with one unit per row, in the form that `clipped_sum` expects.

    The loss of a unit is its value divided by its own weight, so it does not depend on other units.
    """

    model: Any
    objective: Objective
    frozen: Params
    targets: Params
    grad_sum: Params | None = None

    def __call__(self, trainable: Params, batch: Batch, tracker: NormTracker | None = None) -> Float[Array, " rows"]:
        model = self.model
        if self.grad_sum is not None:
            model, trainable = accumulate_into(model, trainable, self.grad_sum)
        if tracker is not None:
            model = model.tracking(tracker, batch.tokens)
        examples = build_examples(model, self.objective, merge(trainable, self.frozen), self.targets, batch)
        out = example_losses(self.objective, examples, batch.real)
        return jnp.sum(out.value, axis=1) / jnp.maximum(jnp.sum(out.weight, axis=1), 1)

    def adding_to(self, grad_sum: Params) -> UnitLosses:
        """The same losses with gradients that are accumulated onto `grad_sum`."""
        return dataclasses.replace(self, grad_sum=grad_sum)


def check_private(objective: Objective, name: str = "this objective") -> None:
    """Raises ValueError for an objective that couples examples."""
    if objective.couple is not None:
        raise ValueError(
            f"{name} couples the examples of a batch, so their gradients cannot be clipped individually: choose "
            "another objective for a private run"
        )


def private_gradient(
    model, objective: Objective, state: State, slices: Batch, mechanism: Mechanism, root: Array, method: str
) -> tuple[Any, dict[str, Float[Array, " units"]]]:
    """Noisy mean of clipped gradients, accumulated over microbatches.

    Args:
        model, objective, state: define the losses.
        slices: the batch, leading axis the microbatches.
        mechanism: clip rule and noise.
        root: root key of the run.
        method: clipping method, see `shiq_jax.privacy.clipped_sum`.

    Returns:
        the private gradient; and `norm` and `loss` of every unit, which are not private, NaN for padding.
    """
    slots = slices.real.shape[2]
    if slots != 1 and mechanism.unit != "user":
        raise ValueError(
            f"rows have {slots} slots, but a row of a private batch holds one {mechanism.unit}: pack one per row"
        )
    losses = UnitLosses(model, objective, state.frozen, state.targets)
    rounding = float(jnp.finfo(getattr(model, "compute_dtype", jnp.float32)).eps)

    @jax.named_scope("clip")
    def add(total, microbatch):
        real = jnp.any(microbatch.real, axis=1)
        total, norms, values = clipped_sum(
            losses, state.trainable, microbatch, clip=mechanism.clip, mask=real, accumulator=total, margin=rounding,
            method=method, shards=data_parallel_size(model.mesh),
        )  # fmt: skip
        return total, {"norm": jnp.where(real, norms, jnp.nan), "loss": jnp.where(real, values, jnp.nan)}

    if slices.real.shape[0] == 1:
        total, unit_metrics = add(None, jax.tree.map(lambda leaf: leaf[0], slices))
    else:
        zeros = optax.tree.cast(optax.tree.zeros_like(state.trainable), jnp.float32)
        total, unit_metrics = jax.lax.scan(add, zeros, slices)
    with jax.named_scope("noise"):
        private = privatize(total, mechanism, root, state.step)
    return private, {name: leaf.reshape(-1) for name, leaf in unit_metrics.items()}
