"""ShiQ and its ablations on one sequence, with metrics."""

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike

from shiq_jax.objectives.residuals import bellman_residuals, squared_residuals, state_values
from shiq_jax.objectives.types import Sequence
from shiq_jax.objectives.validation import as_mask, check_choice, logratios, masked


def shiq(
    sequence: Sequence,
    *,
    beta: ArrayLike,
    gamma: ArrayLike = 1.0,
    horizon: Literal["multi", "one", "trajectory", "n_step"] = "multi",
    n: int | None = None,
    value: Literal["lse_shift", "lse"] = "lse_shift",
    gradient: Literal["full", "semi"] = "full",
    normalisation: Literal["sum_t", "mean_t"] = "sum_t",
    position_weight: Literal["none", "inv_position"] = "none",
) -> tuple[Array, dict[str, Array]]:
    """ShiQ loss of one sequence [T]: `shiq_loss` by default, its ablations with other options.

    Args:
      beta: temperature of the KL regularization, in units of reward per nat.
      gamma: discount per action, in (0, 1].
      horizon: span of a residual: to the end, one action, from the first action only, or n actions.
      n: number of actions of an n-step residual.
      value: value of a state, with or without subtracting that of the reference.
      gradient: whether terms after an action are differentiated; semi is unbiased under stochastic users or tools.
      normalisation: sum or mean of the squared residuals of a sequence.
      position_weight: weight of the k-th action's squared residual: 1, or 1/k.

    Returns:
      The loss, and metrics: `residual_abs`, the mean over actions of |residual|; `value`, the value of the first state;
      `logratio` and `return`, the sums over actions of the log-ratio (nats) and the reward; `lse_abs`, the mean of
      |lse|, which is 0 if normalized logits were passed instead of raw ones.
    """
    check_choice("value", value, ("lse_shift", "lse"))
    policy, reference, rewards, action_mask, bootstrap = sequence
    residuals = bellman_residuals(
        policy,
        reference,
        rewards,
        action_mask,
        beta=beta,
        gamma=gamma,
        horizon=horizon,
        n=n,
        value=value,
        bootstrap=bootstrap,
        gradient=gradient,
    )
    loss = squared_residuals(residuals, action_mask, normalisation=normalisation, position_weight=position_weight)
    mask = as_mask(action_mask)
    num_actions = jnp.maximum(jnp.sum(mask), 1)
    values = state_values(policy, reference, mask, beta=beta, value=value)
    metrics = {
        "residual_abs": jnp.sum(jnp.abs(residuals)) / num_actions,
        "value": jnp.sum(jnp.where(jnp.cumsum(mask) == 1, values, 0)),
        "logratio": jnp.sum(logratios(policy, reference, mask)),
        "return": jnp.sum(masked(rewards, mask)),
        "lse_abs": jnp.sum(jnp.abs(masked(policy.lse, mask))) / num_actions,
    }
    return loss, metrics


def reval(sequence: Sequence, *, beta: ArrayLike) -> tuple[Array, dict[str, Array]]:
    """ReVal loss of one sequence: (lse - lse_ref at the first action + logratio - R / beta)^2.

    This is the square of ShiQ's first residual divided by beta^2. Metrics as in `shiq`. Source: arXiv 2603.23355.
    """
    loss, metrics = shiq(sequence, beta=beta, horizon="trajectory")
    return loss / beta**2, metrics


def tbrm(sequence: Sequence, *, beta: ArrayLike) -> tuple[Array, dict[str, Array]]:
    """TBRM loss of one sequence: `reval` without lse_ref, (lse at the first action + logratio - R / beta)^2.

    Metrics as in `shiq`. Source: arXiv 2505.15311.
    """
    loss, metrics = shiq(sequence, beta=beta, horizon="trajectory", value="lse")
    return loss / beta**2, metrics
