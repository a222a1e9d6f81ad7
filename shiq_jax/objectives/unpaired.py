"""Losses on single completions with a label, good or bad, as functions of their log-ratio.

Shapes, types, errors and `s` as in `preference`; `desirable` is a boolean of the log-ratio's shape.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float

from shiq_jax.objectives.inputs import as_mask, check_positive, same_shape, widened


def kto_loss(
    logratio: Float[Array, "..."],
    desirable: Bool[Array, "..."],
    *,
    kl: ArrayLike,
    beta: ArrayLike,
    desirable_weight: ArrayLike = 1.0,
    undesirable_weight: ArrayLike = 1.0,
) -> Float[Array, "..."]:
    """w (1 - s(beta (logratio - kl))) for a desirable, w (1 - s(beta (kl - logratio))) for an undesirable completion.

    Args:
      kl: the reference point, a constant of at least 0: an estimate of KL(pi || pi_ref), in nats. Published is
        max(0, mean log-ratio of completions that belong to other prompts), without gradient.
      desirable_weight, undesirable_weight: w of either kind.

    Source: KTO (arXiv 2402.01306).
    """
    signed, wanted = _signed(logratio, desirable, beta, jax.lax.stop_gradient(kl))
    return jnp.where(wanted, desirable_weight, undesirable_weight) * jax.nn.sigmoid(-signed)


def apo_zero_unpaired_loss(
    logratio: Float[Array, "..."], desirable: Bool[Array, "..."], *, beta: ArrayLike
) -> Float[Array, "..."]:
    """1 - s(beta logratio) for a desirable, s(beta logratio) for an undesirable completion.

    Source: APO (arXiv 2408.06266) for single completions, as in TRL's KTO trainer.
    """
    return jax.nn.sigmoid(-_signed(logratio, desirable, beta, 0.0)[0])


def _signed(logratio, desirable, beta, shift) -> tuple[Array, Array]:
    same_shape(logratio=logratio, desirable=desirable)
    check_positive("beta", beta)
    wanted = as_mask(desirable)
    value = beta * (widened(logratio) - shift)
    return jnp.where(wanted, value, -value), wanted
