"""Weights for preference losses: of pairs (WPO) and of tokens beyond the shorter completion (LD-DPO)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float

from shiq_jax.objectives.types import TokenStats
from shiq_jax.objectives.validation import as_mask, check_sequence, masked, sequence_length


def wpo_weight(policy: TokenStats, action_mask: Bool[Array, " T"]) -> Float[Array, ""]:
    """WPO weight of a completion: exp of the mean over actions of log pi - log sum_a pi(a)^2.

    It is larger for completions that the policy is more likely to generate. The loss of a pair is multiplied by the
    weights of both completions. The weight carries no gradient.

    Args:
      policy: statistics [T] with `lse2`; log sum_a pi(a)^2 = lse2 - 2 lse.
      action_mask: [T].

    Returns:
      A scalar, 1 for a sequence without actions.

    Raises:
      ValueError: while tracing, for mismatched shapes or a missing `lse2`.

    Source: WPO (arXiv 2406.11827, eq. 2).
    """
    length = sequence_length(action_mask)
    for name in ("logp", "lse", "lse2"):
        check_sequence(f"policy.{name}", getattr(policy, name), length)
    mask = as_mask(action_mask)
    logp, lse, lse2 = (masked(getattr(policy, name), mask) for name in ("logp", "lse", "lse2"))
    log_weight = jnp.sum(logp - (lse2 - 2 * lse)) / jnp.maximum(jnp.sum(mask), 1)
    return jax.lax.stop_gradient(jnp.exp(log_weight))


def length_desensitised(
    values: Float[Array, " T"], action_mask: Bool[Array, " T"], *, shared: ArrayLike, alpha: ArrayLike
) -> Float[Array, ""]:
    """Sum of log-probabilities or log-ratios over actions, with those after the first `shared` actions scaled by alpha.

    Args:
      values: [T], read at actions only.
      action_mask: [T].
      shared: number of actions of the shorter completion of the pair.
      alpha: in [0, 1]; 1 is the plain sum.

    Source: LD-DPO (arXiv 2409.06411).
    """
    check_sequence("values", values, sequence_length(action_mask))
    mask = as_mask(action_mask)
    weights = jnp.where(jnp.cumsum(mask) <= shared, 1, alpha)
    return jnp.sum(masked(values, mask) * weights)
