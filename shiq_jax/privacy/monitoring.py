"""What a private run with Adam is told of itself by public data: the loss-improvement analysis at one state of it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from shiq_jax.privacy.clip_rules import Groupwise
from shiq_jax.privacy.clipped_sum import Losses, clipped_sum
from shiq_jax.privacy.loss_improvement import adam_preconditioner, improvement, landscape
from shiq_jax.privacy.mechanism import Mechanism
from shiq_jax.privacy.public_to_private import adam_state


def monitor(
    losses: Losses,
    params: Any,
    opt_state: optax.OptState,
    batches: Any,
    key: Array,
    *,
    mechanism: Mechanism,
    b2: float,
    probes: int = 16,
) -> dict[str, Float[Array, ""]]:
    """What a private step could gain here, and what of that noise takes, in the metric of Adam, from public data alone.

    Args:
        losses: of units, see `clipped_sum`.
        params, opt_state: of the run; its optimiser has one Adam.
        batches: pytree of arrays `[batches, units, ...]` of public data, two batches at least.
        key: jax key of Hutchinson's probes.
        mechanism: of the private steps.
        b2: Adam's.
        probes: how many.

    Returns:
        by name all of `Landscape` and `Improvement`, and `clipped`, the mean factor by which the clip rule scales.
    """
    memory = adam_state(opt_state)
    scale = adam_preconditioner(memory, b2)
    # Before the first update nothing is known of the squares.
    scale = jax.tree.map(lambda leaf: jnp.where(memory.count > 0, leaf, 1.0), scale)
    found = landscape(
        lambda params, batch: jnp.mean(losses(params, batch, None)), params, batches, key,
        units=jax.tree.leaves(batches)[0].shape[1], probes=probes, preconditioner=scale,
    )  # fmt: skip
    # Groups are clipped by their own norms; of the whole their rule is the nearest that can be said.
    rule = mechanism.clip.rule if isinstance(mechanism.clip, Groupwise) else mechanism.clip
    one = jax.tree.map(lambda leaf: leaf[0], batches)
    clipped = jnp.mean(rule(clipped_sum(losses, params, one, clip=rule, method="scan")[1]))
    gain = improvement(found, mechanism.expected_batch, mechanism.noise_stddev, clipped)
    return found._asdict() | gain._asdict() | {"clipped": clipped}
