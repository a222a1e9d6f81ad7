"""Losses on preferences, as functions of log-ratios: log pi - log pi_ref, summed over the actions of a completion."""

from numbers import Real

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from shiq_jax.objectives.inputs import check_positive, widened


def dpo_loss(
    chosen_logratio: Float[Array, "..."],
    rejected_logratio: Float[Array, "..."],
    *,
    beta: ArrayLike,
    label_smoothing: ArrayLike = 0.0,
) -> Float[Array, "..."]:
    """The DPO loss of a pair: how little the policy has learnt to tell the chosen from the rejected completion.

        -(1 - eps) log sigmoid(beta d) - eps log sigmoid(-beta d),      d = chosen_logratio - rejected_logratio

    Args:
      chosen_logratio: sum over the chosen completion of log pi - log pi_ref, in nats. A scalar; other shapes are
        elementwise.
      rejected_logratio: the same of the rejected completion, of the same shape.
      beta: temperature > 0.
      label_smoothing: eps in [0, 1/2), the assumed rate of wrong labels.

    Returns:
      The loss in nats, log 2 when the log-ratios agree; same shape. Computed in fp32 (fp64 for fp64).

    Raises:
      ValueError: while tracing, for shapes that disagree and options out of range. beta and label_smoothing may be
        traced; only Python numbers are range-checked.

    Source: DPO (arXiv 2305.18290, eq. 7); with eps > 0 its conservative form cDPO.
    """
    if jnp.shape(chosen_logratio) != jnp.shape(rejected_logratio):
        raise ValueError(
            f"chosen_logratio has shape {jnp.shape(chosen_logratio)} but rejected_logratio has shape "
            f"{jnp.shape(rejected_logratio)}; give both the same."
        )
    check_positive("beta", beta)
    if isinstance(label_smoothing, Real) and not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing is {label_smoothing} but must lie in [0, 0.5).")
    logit = beta * (widened(chosen_logratio) - widened(rejected_logratio))
    return -(1 - label_smoothing) * jax.nn.log_sigmoid(logit) - label_smoothing * jax.nn.log_sigmoid(-logit)
