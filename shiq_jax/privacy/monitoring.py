"""Loss-improvement diagnostics for private Adam, estimated on public data."""

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


def improvement_metrics(
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
    """Estimate the improvement of a private Adam step with noise and without, on public data only.

    Args:
        losses: per-unit losses, see `clipped_sum`.
        params: current parameters of the run.
        opt_state: current optimizer state, with exactly one Adam.
        batches: pytree of arrays [batches, units, ...] of public data, two batches or more.
        key: jax key of Hutchinson's probes.
        mechanism: mechanism of the private steps.
        b2: decay rate of Adam's second moment.
        probes: number of probes.

    Returns:
        All fields of `Landscape` and `Improvement`, and `clipped`, the mean factor of the clip rule.
    """
    adam = adam_state(opt_state)
    # Before the first update Adam has no second moments, so use the identity.
    preconditioner = jax.tree.map(lambda leaf: jnp.where(adam.count > 0, leaf, 1.0), adam_preconditioner(adam, b2))
    geometry = landscape(
        lambda params, batch: jnp.mean(losses(params, batch, None)), params, batches, key,
        units=jax.tree.leaves(batches)[0].shape[1], probes=probes, preconditioner=preconditioner,
    )  # fmt: skip
    # Groups have a factor each; the factor of their rule on the whole gradient approximates the mean.
    rule = mechanism.clip.rule if isinstance(mechanism.clip, Groupwise) else mechanism.clip
    batch = jax.tree.map(lambda leaf: leaf[0], batches)
    _, norms, _ = clipped_sum(losses, params, batch, clip=rule, method="scan")
    clip_factor = jnp.mean(rule(norms))
    result = improvement(geometry, mechanism.expected_batch, mechanism.noise_stddev, clip_factor)
    return geometry._asdict() | result._asdict() | {"clipped": clip_factor}
