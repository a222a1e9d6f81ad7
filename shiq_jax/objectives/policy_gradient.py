"""The policy gradient on sequences that are there already, as a baseline for losses that may learn from them."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float

from shiq_jax.objectives.validation import as_mask, check_positive, masked, same_shape


def reinforce_loss(
    logratios: Float[Array, "... K"], returns: Float[Array, "... K"], real: Bool[Array, "... K"], *, beta: ArrayLike
) -> Float[Array, "... K"]:
    """-A lr of each answer, A = (R - beta lr) less its mean over the prompt's other answers, without gradient.

    Its gradient is that of reward less beta KL where the answers are samples of the policy itself. On a buffer they are
    the reference's, and without importance weights the estimate is biased as soon as the policy has moved.

    Args:
      logratios, returns: of the answers to one prompt, in nats and units of reward.
      real: which of them there are; the others get 0 and may hold anything.
      beta: weight of the KL, > 0.

    Source: REINFORCE (Williams, 1992) with the leave-one-out baseline of RLOO (arXiv 2402.14740).
    """
    same_shape(logratios=logratios, returns=returns)
    same_shape(logratios=logratios, real=real)
    check_positive("beta", beta)
    mask = as_mask(real)
    logratios = masked(logratios, mask)
    gains = jax.lax.stop_gradient(masked(returns, mask) - beta * logratios)
    count = jnp.sum(mask, axis=-1, keepdims=True)
    others = (jnp.sum(gains, axis=-1, keepdims=True) - gains) / jnp.maximum(count - 1, 1)
    return jnp.where(mask, (others - gains) * logratios, 0)
