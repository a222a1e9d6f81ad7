"""Q-learning baselines: Q and V heads trained on stored sequences.

The output of a Q head is represented by two floats per token, like a policy: the `TokenStats` of Q(s, .) at the token a
that was taken. Then Q(s, a) = logp + lse, and -logp is the cross-entropy of softmax(Q(s, .)) at a, the CQL penalty that
keeps Q low for tokens outside the data. No array over the vocabulary is needed, and memory is linear in the tokens.

All losses take one sequence [T] and return the sum over its actions; the published losses average over the actions of a
batch. Shared arguments:

  rewards: [T], the reward for emitting each token.
  action_mask: [T], True where the model chose the token. The successor of an action is the next action, skipping tokens
    in between; the value after the last action is 0, or `bootstrap` if given.
  gamma: discount in (0, 1].
  alpha: weight of the cross-entropy.

Computed in float32 (float64 for float64 inputs). Mismatched shapes and Python numbers out of range raise ValueError
while tracing.
Source of the token-level forms: LMRL-Gym (arXiv 2311.18232) and its code.
"""

from numbers import Real

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, Float

from shiq_jax.objectives.residuals import discounted_returns, next_action_values
from shiq_jax.objectives.types import TokenStats
from shiq_jax.objectives.validation import (
    as_float32,
    as_mask,
    check_discount,
    check_nonnegative,
    check_positive,
    check_sequence,
    masked,
    sequence_length,
)


def ilql_loss(
    q: tuple[TokenStats, TokenStats],
    v: Float[Array, " T"],
    target_q: tuple[TokenStats, TokenStats],
    rewards: Float[Array, " T"],
    action_mask: Bool[Array, " T"],
    *,
    gamma: ArrayLike = 0.99,
    tau: ArrayLike = 0.7,
    alpha: ArrayLike = 0.01,
    bootstrap: Float[Array, ""] | None = None,
) -> Float[Array, ""]:
    """ILQL: Q heads regress to r + gamma V(s'), V to an expectile of the smaller target Q.

        sum_i (Q_i - r - gamma V')^2 / 2 + |tau - 1[q < V]| (V - q)^2 / 2 - alpha sum_i logp_i,   q = min of target Q_i,

    with V' and q detached.

    Args:
      q: statistics [T] of both Q heads.
      v: [T], value of the state before each token.
      target_q: statistics [T] of the Polyak-averaged Q heads.
      gamma: discount per action, in (0, 1].
      tau: expectile of V, in (0, 1); values above 1/2 favor better actions.
      alpha: weight of the cross-entropy that keeps Q low for tokens outside the data.
      bootstrap: V of the state at which the sequence was truncated.

    Source: arXiv 2206.11871.
    """
    length = sequence_length(action_mask)
    _check(length, gamma, alpha, rewards=rewards, v=v)
    if isinstance(tau, Real) and not 0 < tau < 1:
        raise ValueError(f"tau is {tau} but an expectile lies in (0, 1).")
    mask = as_mask(action_mask)
    q_values, target_q_values = _action_values("q", q, mask), _action_values("target_q", target_q, mask)
    value = masked(v, mask)
    next_value = next_action_values(value, _final_value(bootstrap, value), mask)
    target = lax.stop_gradient(masked(rewards, mask) + gamma * next_value)
    min_q = lax.stop_gradient(jnp.minimum(*target_q_values))
    weight = lax.stop_gradient(jnp.where(min_q >= value, tau, 1 - tau))
    squares = sum((q_value - target) ** 2 for q_value in q_values) + weight * (value - min_q) ** 2
    return jnp.sum(jnp.where(mask, squares, 0)) / 2 + alpha * _cross_entropy(q, mask)


def cql_loss(
    q: tuple[TokenStats, TokenStats],
    target_q: tuple[TokenStats, TokenStats],
    rewards: Float[Array, " T"],
    action_mask: Bool[Array, " T"],
    *,
    gamma: ArrayLike = 0.99,
    alpha: ArrayLike = 0.01,
    bootstrap: Float[Array, ""] | None = None,
) -> Float[Array, ""]:
    """CQL: two Q heads regress to r + gamma min_i of the target Q_i at the next action of the data.

    Arguments as in `ilql_loss`, but `bootstrap` is the smaller target Q of the action after the truncation.

    Source: arXiv 2006.04779, in the form of LMRL-Gym, which bootstraps from the next action of the data.
    """
    _check(sequence_length(action_mask), gamma, alpha, rewards=rewards)
    mask = as_mask(action_mask)
    q_values, target_q_values = _action_values("q", q, mask), _action_values("target_q", target_q, mask)
    min_q = jnp.minimum(*target_q_values)
    target = masked(rewards, mask) + gamma * next_action_values(min_q, _final_value(bootstrap, min_q), mask)
    squares = sum((q_value - lax.stop_gradient(target)) ** 2 for q_value in q_values)
    return jnp.sum(jnp.where(mask, squares, 0)) / 2 + alpha * _cross_entropy(q, mask)


def mc_returns_loss(
    q: TokenStats,
    rewards: Float[Array, " T"],
    action_mask: Bool[Array, " T"],
    *,
    gamma: ArrayLike = 0.99,
    alpha: ArrayLike = 0.01,
    bootstrap: Float[Array, ""] | None = None,
) -> Float[Array, ""]:
    """Monte Carlo returns: one Q head regresses to the discounted return G, (Q - G)^2 / 2 - alpha logp.

    Arguments as in `ilql_loss`.
    """
    _check(sequence_length(action_mask), gamma, alpha, rewards=rewards)
    mask = as_mask(action_mask)
    (q_value,) = _action_values("q", (q,), mask)
    rewards = masked(rewards, mask)
    returns = lax.stop_gradient(discounted_returns(rewards, _final_value(bootstrap, rewards), mask, gamma))
    return jnp.sum(jnp.where(mask, (q_value - returns) ** 2, 0)) / 2 + alpha * _cross_entropy((q,), mask)


def soft_q_loss(
    q: TokenStats,
    target_lse: Float[Array, " T"],
    rewards: Float[Array, " T"],
    action_mask: Bool[Array, " T"],
    *,
    gamma: ArrayLike = 1.0,
    delta: ArrayLike = 1.0,
    bootstrap: Float[Array, ""] | None = None,
) -> Float[Array, ""]:
    """One-step soft Q-learning with temperature 1: huber(r + gamma lse target Q(s', .) - Q(s, a)).

    Other arguments as in `ilql_loss`.

    Args:
      target_lse: [T], log-sum-exp over tokens of the Polyak-averaged Q head in the state before each token.
      delta: error above which the Huber loss is linear, > 0.
      bootstrap: log-sum-exp of the target Q in the state at which the sequence was truncated.

    Source: soft Q-learning (arXiv 1702.08165).
    """
    _check(sequence_length(action_mask), gamma, 0, rewards=rewards, target_lse=target_lse)
    mask = as_mask(action_mask)
    check_positive("delta", delta)
    (q_value,) = _action_values("q", (q,), mask)
    soft_value = masked(target_lse, mask)
    target = masked(rewards, mask) + gamma * next_action_values(soft_value, _final_value(bootstrap, soft_value), mask)
    error = jnp.abs(lax.stop_gradient(target) - q_value)
    huber = jnp.where(error <= delta, error**2 / 2, delta * (error - delta / 2))
    return jnp.sum(jnp.where(mask, huber, 0))


def _action_values(name: str, heads: tuple[TokenStats, ...], mask) -> tuple[Array, ...]:
    """Q(s, a) of the tokens taken, 0 at other tokens."""
    for head in heads:
        check_sequence(f"{name}.logp", head.logp, mask.shape[0])
        check_sequence(f"{name}.lse", head.lse, mask.shape[0])
    return tuple(masked(head.logp, mask) + masked(head.lse, mask) for head in heads)


def _cross_entropy(heads: tuple[TokenStats, ...], mask) -> Array:
    return -sum(jnp.sum(masked(head.logp, mask)) for head in heads)


def _final_value(bootstrap, values) -> Array:
    return jnp.zeros((), values.dtype) if bootstrap is None else as_float32(bootstrap)


def _check(length: int, gamma, alpha, **arrays) -> None:
    check_discount(gamma)
    check_nonnegative("alpha", alpha)
    for name, array in arrays.items():
        check_sequence(name, array, length)
