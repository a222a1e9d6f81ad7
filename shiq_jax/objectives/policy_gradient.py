"""REINFORCE on stored sequences, a baseline for off-policy losses."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float

from shiq_jax.objectives.validation import as_mask, check_positive, check_same_shape, masked


def reinforce_loss(
    logratios: Float[Array, "... K"], returns: Float[Array, "... K"], real: Bool[Array, "... K"], *, beta: ArrayLike
) -> Float[Array, "... K"]:
    """-A logratio of each answer; A is R - beta logratio minus its mean over the prompt's other answers, detached.

    Its gradient is that of expected reward minus beta KL if the answers are samples of the policy itself. Answers in a
    buffer are samples of the reference: without importance weights the estimate is biased once the policy has moved.

    Args:
      logratios, returns: log-ratios (nats) and returns (units of reward) of the answers to one prompt.
      real: mask of the answers; padding gets a loss of 0 and may hold any values.
      beta: weight of the KL, > 0.

    Source: REINFORCE (Williams, 1992) with the leave-one-out baseline of RLOO (arXiv 2402.14740).
    """
    check_same_shape(logratios=logratios, returns=returns)
    check_same_shape(logratios=logratios, real=real)
    check_positive("beta", beta)
    mask = as_mask(real)
    logratios = masked(logratios, mask)
    soft_returns = jax.lax.stop_gradient(masked(returns, mask) - beta * logratios)
    count = jnp.sum(mask, axis=-1, keepdims=True)
    baselines = (jnp.sum(soft_returns, axis=-1, keepdims=True) - soft_returns) / jnp.maximum(count - 1, 1)
    return jnp.where(mask, (baselines - soft_returns) * logratios, 0)
