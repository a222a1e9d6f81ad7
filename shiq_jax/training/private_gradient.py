"""The private gradient: what an update step takes in the place of the gradient of the mean."""

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
from shiq_jax.training.placement import data_devices
from shiq_jax.training.state import Params, State, merge


@dataclasses.dataclass(frozen=True, eq=False)
class UnitLosses:
    """The losses of a batch of which each row holds one unit, as `clipped_sum` takes them.

    A unit's loss is its value over its weight, which no other unit has a part in.
    """

    model: Any
    objective: Objective
    frozen: Params
    targets: Params
    before: Params | None = None

    def __call__(self, trainable: Params, batch: Batch, tracker: NormTracker | None = None) -> Float[Array, " rows"]:
        model = self.model
        if self.before is not None:
            model, trainable = accumulate_into(model, trainable, self.before)
        if tracker is not None:
            model = model.tracking(tracker, batch.tokens)
        examples = build_examples(model, self.objective, merge(trainable, self.frozen), self.targets, batch)
        out = example_losses(self.objective, examples, batch.real)
        return jnp.sum(out.value, axis=1) / jnp.maximum(jnp.sum(out.weight, axis=1), 1)

    def adding_to(self, before: Params) -> UnitLosses:
        """The same losses; their gradient is added to `before` and becomes the sum."""
        return dataclasses.replace(self, before=before)


def check_private(objective: Objective, name: str = "this objective") -> None:
    """Raises ValueError for an objective whose examples know of each other."""
    if objective.couple is not None:
        raise ValueError(
            f"{name} couples the examples of a batch, so that none of them can be clipped by itself: choose another "
            "objective for a private run"
        )


def private_gradient(
    model, objective: Objective, state: State, slices: Batch, mechanism: Mechanism, root: Array, method: str
) -> tuple[Any, dict[str, Float[Array, " units"]]]:
    """The noisy mean of clipped gradients over slices that are run one after the other.

    Returns:
        what may be released; and by name what may not: `norm` and `loss` of every unit, NaN where there is none.
    """
    slots = slices.real.shape[2]
    if slots != 1 and mechanism.unit != "user":
        raise ValueError(
            f"rows have {slots} slots, but a row of a private batch holds one {mechanism.unit}: pack each into its own"
        )
    losses = UnitLosses(model, objective, state.frozen, state.targets)
    rounding = float(jnp.finfo(getattr(model, "compute_dtype", jnp.float32)).eps)

    def add(total, piece):
        real = jnp.any(piece.real, axis=1)
        total, norms, values = clipped_sum(
            losses, state.trainable, piece, clip=mechanism.clip, mask=real, accumulator=total, margin=rounding,
            method=method, shards=data_devices(model.mesh),
        )  # fmt: skip
        secret = {"norm": jnp.where(real, norms, jnp.nan), "loss": jnp.where(real, values, jnp.nan)}
        return total, secret

    if slices.real.shape[0] == 1:
        total, secret = add(None, jax.tree.map(lambda leaf: leaf[0], slices))
    else:
        zeros = optax.tree.cast(optax.tree.zeros_like(state.trainable), jnp.float32)
        total, secret = jax.lax.scan(add, zeros, slices)
    released = privatize(total, mechanism, root, state.step)
    return released, {name: leaf.reshape(-1) for name, leaf in secret.items()}
