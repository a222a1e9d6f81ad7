"""Losses whose values come from a learned head: OREO, path consistency, DRO.

The value losses take the statistics of one sequence [T] with `v`, [T], the head's value of the state before each token.
They are `bellman_residuals` with `value="given"`, and differ in how far one looks and in what each square trains.
Computed in fp32 (fp64 for fp64); ValueErrors while tracing name shapes that disagree and Python numbers out of range.
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
    """OREO: the mean over t of (sum_{k >= t} (r_k - beta lr_k) - v_t)^2, once for the head and once for the policy.

    The first square sees the policy as a constant, the second the head; so the value is twice the mean square. The
    paper's regulariser, a KL divergence to the reference over whole distributions, is not part of it.

    Args:
      policy, reference, rewards, action_mask: as in `shiq_loss`.
      gradient: whether what follows an action is differentiated; semi is unbiased where users or tools answer at random.

    Source: arXiv 2412.16145.
    """
    options = {"beta": beta, "value": "given"}
    fixed = jax.lax.stop_gradient
    critic = bellman_residuals(fixed(policy), reference, rewards, action_mask, values=v, **options)
    actor = bellman_residuals(policy, reference, rewards, action_mask, values=fixed(v), gradient=gradient, **options)
    return sum(squared_residuals(each, action_mask, normalisation="mean_t") for each in (critic, actor))


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
    """Path consistency: the sum over actions of (sum_{k<n} gamma^k (r - beta log pi) + gamma^n v_{t+n} - v_t)^2.

    Entropy regularises, not a reference; policy and head both learn from every square.

    Args:
      policy, rewards, action_mask: as in `shiq_loss`.
      n: actions of an n-step residual.

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
    """DRO-V: half of (R - beta lr - v)^2 for the head, and 1 / beta times that for the policy; v of the first action.

    R and lr are sums over the actions. The gradients are those of the published pair of losses,
    -(lr (R - v) - beta lr^2 / 2) for the policy and half the squared residual for the head.

    Arguments as in `shiq_loss`. Source: arXiv 2405.19107.
    """
    options = {"beta": beta, "value": "given", "horizon": "trajectory"}
    fixed = jax.lax.stop_gradient
    critic = bellman_residuals(fixed(policy), reference, rewards, action_mask, values=v, **options)
    actor = bellman_residuals(policy, reference, rewards, action_mask, values=fixed(v), **options)
    return squared_residuals(critic, action_mask) / 2 + squared_residuals(actor, action_mask) / (2 * beta)
