"""Supervised fine-tuning (SFT): maximum likelihood of demonstrated tokens."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from shiq_jax.objectives.types import TokenStats
from shiq_jax.objectives.validation import as_mask, check_sequence, masked, sequence_length


def sft_loss(policy: TokenStats, action_mask: Bool[Array, " T"]) -> Float[Array, ""]:
    """Negative log-likelihood in nats, summed over the actions of one sequence.

    For the usual token mean, divide the sum over the batch by its number of actions.

    Args:
      policy: statistics [T]; only `logp` is read, and only at actions.
      action_mask: [T], True at the tokens to learn.

    Returns:
      A scalar, 0 for a sequence without actions. Computed in float32 (float64 for float64 inputs).

    Raises:
      ValueError: while tracing, for mismatched shapes.
    """
    check_sequence("policy.logp", policy.logp, sequence_length(action_mask))
    return -jnp.sum(masked(policy.logp, as_mask(action_mask)))
