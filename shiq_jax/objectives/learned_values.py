"""Losses whose values come from a learned head: OREO, path consistency, DRO; and objectives on all that heads say.

The value losses take the statistics of one sequence [T] with `v`, [T], the head's value of the state before each token.
They are `bellman_residuals` with `value="given"`, and differ in how far one looks and in what each square trains.
Computed in fp32 (fp64 for fp64); ValueErrors while tracing name shapes that disagree and Python numbers out of range.
"""

from collections.abc import Callable, Mapping
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float

from shiq_jax.objectives.inputs import as_mask, logratios, masked
from shiq_jax.objectives.pairs import fields, reference_of
from shiq_jax.objectives.q_learning import cql_loss, ilql_loss, mc_returns_loss
from shiq_jax.objectives.residuals import bellman_residuals, squared_residuals
from shiq_jax.objectives.types import Example, LossOut, TokenStats


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

    Args: as `shiq_loss`; gradient: "semi" lets only log pi of action t itself learn from the t-th square.

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

    Args: as `shiq_loss`; n: actions of a path, a Python integer.

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

    Args: as `shiq_loss`.

    Source: arXiv 2405.19107.
    """
    options = {"beta": beta, "value": "given", "horizon": "trajectory"}
    fixed = jax.lax.stop_gradient
    critic = bellman_residuals(fixed(policy), reference, rewards, action_mask, values=v, **options)
    actor = bellman_residuals(policy, reference, rewards, action_mask, values=fixed(v), **options)
    return squared_residuals(critic, action_mask) / 2 + squared_residuals(actor, action_mask) / (2 * beta)


def oreo(example: Example, *, beta: ArrayLike = 0.03, gradient: str = "full") -> LossOut:
    """`oreo_loss` of each sequence, whose head is called "value". Weight: the sequences with at least one action.

    Metrics per sequence: `value`, the head's of the first state; `logratio` and `return`, sums over actions.
    """
    reference = reference_of(example, "oreo")

    def one(policy, action_mask, rewards, values, reference):
        return oreo_loss(policy, reference, values["value"], rewards, action_mask, beta=beta, gradient=gradient)

    return _with_policy(example, "oreo", one, reference)


def pcl(example: Example, *, beta: ArrayLike = 0.1, gamma: ArrayLike = 1.0, n: int = 10) -> LossOut:
    """`pcl_loss` of each sequence. Head, weight and metrics as `oreo`; `logratio` is the log-probability."""

    def one(policy, action_mask, rewards, values, _):
        return pcl_loss(policy, values["value"], rewards, action_mask, beta=beta, gamma=gamma, n=n)

    return _with_policy(example, "pcl", one, None)


def dro(example: Example, *, beta: ArrayLike = 0.1) -> LossOut:
    """`dro_loss` of each sequence. Head, weight and metrics as `oreo`."""
    reference = reference_of(example, "dro")

    def one(policy, action_mask, rewards, values, reference):
        return dro_loss(policy, reference, values["value"], rewards, action_mask, beta=beta)

    return _with_policy(example, "dro", one, reference)


def ilql(example: Example, *, gamma: ArrayLike = 0.99, tau: ArrayLike = 0.7, alpha: ArrayLike = 0.01) -> LossOut:
    """`ilql_loss` of each sequence, heads "q1", "q2" and "value", slow copies "target_q1" and "target_q2".

    Weight: the actions. Metrics per action: `q`, of the first head at the token that was taken, and `value`.
    """

    def one(action_mask, rewards, values, bootstrap):
        return ilql_loss(
            (values["q1"], values["q2"]), values["value"], (values["target_q1"], values["target_q2"]), rewards,
            action_mask, gamma=gamma, tau=tau, alpha=alpha, bootstrap=bootstrap,
        )  # fmt: skip

    return _without_policy(example, "ilql", one)


def cql(example: Example, *, gamma: ArrayLike = 0.99, alpha: ArrayLike = 0.01) -> LossOut:
    """`cql_loss` of each sequence; heads, weight and metrics as `ilql`, without "value"."""

    def one(action_mask, rewards, values, bootstrap):
        return cql_loss(
            (values["q1"], values["q2"]), (values["target_q1"], values["target_q2"]), rewards, action_mask,
            gamma=gamma, alpha=alpha, bootstrap=bootstrap,
        )  # fmt: skip

    return _without_policy(example, "cql", one)


def mc_returns(example: Example, *, gamma: ArrayLike = 0.99, alpha: ArrayLike = 0.01) -> LossOut:
    """`mc_returns_loss` of each sequence; one head, "q1". Weight and metrics as `ilql`, without "value"."""

    def one(action_mask, rewards, values, bootstrap):
        return mc_returns_loss(values["q1"], rewards, action_mask, gamma=gamma, alpha=alpha, bootstrap=bootstrap)

    return _without_policy(example, "mc_returns", one)


def _with_policy(example: Example, name: str, loss: Callable, reference: TokenStats | None) -> LossOut:
    def one(policy, action_mask, rewards, values, reference):
        value = loss(policy, action_mask, rewards, values, reference)
        mask = as_mask(action_mask)
        metrics = {
            "value": jnp.sum(jnp.where(jnp.cumsum(mask) == 1, masked(values["value"], mask), 0)),
            "logratio": jnp.sum(logratios(policy, reference, mask)),
            "return": jnp.sum(masked(rewards, mask)),
        }
        return LossOut(value, jnp.any(mask).astype(value.dtype), metrics)

    given = fields(example, name, "policy", "action_mask", "rewards", "values")
    return jax.tree.map(jnp.sum, jax.vmap(one)(*given, reference))


def _without_policy(example: Example, name: str, loss: Callable) -> LossOut:
    def one(action_mask, rewards, values: Mapping, bootstrap):
        value, mask = loss(action_mask, rewards, values, bootstrap), as_mask(action_mask)
        metrics = {"q": jnp.sum(masked(values["q1"].logp, mask) + masked(values["q1"].lse, mask))}
        if "value" in values:
            metrics["value"] = jnp.sum(masked(values["value"], mask))
        return LossOut(value, jnp.sum(mask).astype(value.dtype), metrics)

    given = fields(example, name, "action_mask", "rewards", "values")
    return jax.tree.map(jnp.sum, jax.vmap(one)(*given, example.bootstrap))
