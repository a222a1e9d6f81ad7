"""Losses with a learned value head: OREO, path consistency learning (PCL) and DRO.

All take the statistics of one sequence [T] and `v` [T], the head's value of the state before each token. They sum
squares of `bellman_residuals` with `value="given"` and differ in the horizon and in the parameters that each square
trains. Computed in float32 (float64 for float64 inputs). Mismatched shapes and Python numbers out of range raise
ValueError while tracing.
"""

from typing import Literal

import jax
from jaxtyping import Array, ArrayLike, Bool, Float

from shiq_jax.objectives.residuals import bellman_residuals, squared_residuals
from shiq_jax.objectives.types import TokenStats


def oreo_loss(
    policy: TokenStats,
    reference: TokenStats | None,
    v: Float[Array, " T"],
    rewards: Float[Array, " T"],
    action_mask: Bool[Array, " T"],
    *,
    beta: ArrayLike,
    gradient: Literal["full", "semi"] = "full",
) -> Float[Array, ""]:
    """OREO: mean over t of (sum_{k >= t} (r_k - beta logratio_k) - v_t)^2, once for the head and once for the policy.

    The first term stops the gradient of the policy, the second that of the head, so the loss is twice the mean square.
    The paper's KL regularizer over full distributions is not included.

    Args:
      policy, reference, rewards, action_mask: as in `shiq_loss`.
      gradient: whether terms after an action are differentiated; semi is unbiased under stochastic users or tools.

    Source: arXiv 2412.16145.
    """
    options = {"beta": beta, "value": "given"}
    frozen = jax.lax.stop_gradient
    critic = bellman_residuals(frozen(policy), reference, rewards, action_mask, values=v, **options)
    actor = bellman_residuals(policy, reference, rewards, action_mask, values=frozen(v), gradient=gradient, **options)
    return sum(squared_residuals(residuals, action_mask, normalisation="mean_t") for residuals in (critic, actor))


def pcl_loss(
    policy: TokenStats,
    v: Float[Array, " T"],
    rewards: Float[Array, " T"],
    action_mask: Bool[Array, " T"],
    *,
    beta: ArrayLike,
    gamma: ArrayLike = 1.0,
    n: int = 10,
) -> Float[Array, ""]:
    """PCL: sum over actions of (sum_{k<n} gamma^k (r - beta log pi) + gamma^n v_{t+n} - v_t)^2.

    Regularized by entropy instead of a reference; each square trains both the policy and the head.

    Args:
      policy, rewards, action_mask: as in `shiq_loss`.
      n: number of actions of an n-step residual.

    Source: arXiv 1702.08892.
    """
    residuals = bellman_residuals(
        policy, None, rewards, action_mask, beta=beta, gamma=gamma, horizon="n_step", n=n, value="given", values=v
    )
    return squared_residuals(residuals, action_mask)


def dro_loss(
    policy: TokenStats,
    reference: TokenStats | None,
    v: Float[Array, " T"],
    rewards: Float[Array, " T"],
    action_mask: Bool[Array, " T"],
    *,
    beta: ArrayLike,
) -> Float[Array, ""]:
    """DRO-V: (R - beta logratio - v_1)^2 / 2 for the head, and 1 / beta times that for the policy.

    v_1 is the value of the first state; R and logratio are sums over the actions. The gradients equal those of the
    published losses, -(logratio (R - v_1) - beta logratio^2 / 2) for the policy and half the squared residual for the
    head.

    Arguments as in `shiq_loss`. Source: arXiv 2405.19107.
    """
    options = {"beta": beta, "value": "given", "horizon": "trajectory"}
    frozen = jax.lax.stop_gradient
    critic = bellman_residuals(frozen(policy), reference, rewards, action_mask, values=v, **options)
    actor = bellman_residuals(policy, reference, rewards, action_mask, values=frozen(v), **options)
    return squared_residuals(critic, action_mask) / 2 + squared_residuals(actor, action_mask) / (2 * beta)
