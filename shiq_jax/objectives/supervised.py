"""Supervised fine-tuning: maximum likelihood of the tokens that a demonstrator chose."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from shiq_jax.objectives.types import TokenStats
from shiq_jax.objectives.validation import as_mask, check_sequence, masked, sequence_length


def sft_loss(policy: TokenStats, action_mask: Bool[Array, " T"]) -> Float[Array, ""]:
    """The negative log-likelihood of one sequence's actions, summed, in nats.

    Divide by the number of actions, over the whole batch, for the usual token mean.

    Args:
      policy: statistics [T]; only `logp` is read, and only at actions.
      action_mask: [T], true where the token is to be learnt.

    Returns:
      A scalar, 0 for a sequence without actions. Computed in fp32 (fp64 for fp64).

    Raises:
      ValueError: while tracing, for shapes that disagree.
    """
    check_sequence("policy.logp", policy.logp, sequence_length(action_mask))
    return -jnp.sum(masked(policy.logp, as_mask(action_mask)))
