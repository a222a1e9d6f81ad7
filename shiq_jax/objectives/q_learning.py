"""Q-learning baselines: heads that estimate Q and V of tokens, trained on stored sequences.

A Q head is described like a policy, by two floats per token: the `TokenStats` of its row Q(s, .) at the token a that
was taken, so that Q(s, a) = logp + lse and -logp is the cross-entropy of softmax(Q(s, .)) at a, which keeps Q low
where no data are. No array over the vocabulary is needed, and memory is linear in the number of tokens.

All losses take one sequence [T] and return the sum over its actions; the published losses average over the actions of a
batch. Arguments that all of them share:

  rewards: [T], for emitting each token; action_mask: [T], true where the model chose the token. What follows an action
    is the next action, however many other tokens lie between, and nothing after the last, or `bootstrap`, its value.
  gamma: discount in (0, 1]. alpha: weight of the cross-entropy.

Computed in fp32 (fp64 for fp64). ValueErrors while tracing name shapes that disagree and Python numbers out of range.
Sources: LMRL-Gym (arXiv 2311.18232) and its code for the forms on language.
"""

from numbers import Real

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, Float

from shiq_jax.objectives.residuals import next_action, suffix_sum
from shiq_jax.objectives.types import TokenStats
from shiq_jax.objectives.validation import (
    as_float32,
    as_mask,
    check_discount,
    check_not_negative,
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
    """Implicit language Q-learning: Q heads towards r + gamma V(s'), V towards an expectile of the smaller target Q.

        sum_i (Q_i - r - gamma V')^2 / 2 + |tau - 1[q < V]| (V - q)^2 / 2 - alpha sum_i logp_i,   q = min of target Q_i

    with the first target and q constant.

    Args:
      q: statistics [T] of both heads. v: [T], value of the state before each token.
      target_q: the same heads with slowly averaged weights.
      gamma: discount per action, in (0, 1].
      tau: expectile of V in (0, 1); above 1/2 it leans towards the better actions.
      alpha: weight of the cross-entropy that keeps Q low where no data are.
      bootstrap: V of the state in which the sequence was cut.

    Source: arXiv 2206.11871.
    """
    length = sequence_length(action_mask)
    _check(length, gamma, alpha, rewards=rewards, v=v)
    if isinstance(tau, Real) and not 0 < tau < 1:
        raise ValueError(f"tau is {tau} but an expectile lies in (0, 1).")
    mask = as_mask(action_mask)
    heads, targets = (_taken(each, mask, name) for each, name in ((q, "q"), (target_q, "target_q")))
    value = masked(v, mask)
    ahead = lax.stop_gradient(masked(rewards, mask) + gamma * next_action(value, _beyond(bootstrap, value), mask))
    smaller = lax.stop_gradient(jnp.minimum(*targets))
    weight = lax.stop_gradient(jnp.where(smaller >= value, tau, 1 - tau))
    squares = sum((head - ahead) ** 2 for head in heads) + weight * (value - smaller) ** 2
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
    """Conservative Q-learning: two Q heads towards r + gamma min of the target Q at the next action of the data.

    Args as `ilql_loss`; bootstrap: the smaller target Q of the action after the cut. Source: arXiv 2006.04779, in the
    form of LMRL-Gym, whose next action is the data's.
    """
    _check(sequence_length(action_mask), gamma, alpha, rewards=rewards)
    mask = as_mask(action_mask)
    heads, targets = (_taken(each, mask, name) for each, name in ((q, "q"), (target_q, "target_q")))
    smaller = jnp.minimum(*targets)
    ahead = masked(rewards, mask) + gamma * next_action(smaller, _beyond(bootstrap, smaller), mask)
    squares = sum((head - lax.stop_gradient(ahead)) ** 2 for head in heads)
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
    """One Q head towards the discounted return that followed: (Q - G)^2 / 2 - alpha logp. Args as `ilql_loss`."""
    _check(sequence_length(action_mask), gamma, alpha, rewards=rewards)
    mask = as_mask(action_mask)
    (head,) = _taken((q,), mask, "q")
    gains = masked(rewards, mask)
    returns = lax.stop_gradient(suffix_sum(gains, _beyond(bootstrap, gains), mask, gamma))
    return jnp.sum(jnp.where(mask, (head - returns) ** 2, 0)) / 2 + alpha * _cross_entropy((q,), mask)


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
    """Soft Q-learning in one step: huber(r + gamma lse target Q(s', .) - Q(s, a)), in units where the temperature is 1.

    Args:
      target_lse: [T], log-sum-exp of the target head before each token.
      delta: where the square of the Huber loss becomes a line.
      bootstrap: the log-sum-exp at the cut. Others as `ilql_loss`.
    """
    _check(sequence_length(action_mask), gamma, 0, rewards=rewards, target_lse=target_lse)
    mask = as_mask(action_mask)
    (head,) = _taken((q,), mask, "q")
    soft = masked(target_lse, mask)
    ahead = masked(rewards, mask) + gamma * next_action(soft, _beyond(bootstrap, soft), mask)
    error = jnp.abs(lax.stop_gradient(ahead) - head)
    huber = jnp.where(error <= delta, error**2 / 2, delta * (error - delta / 2))
    return jnp.sum(jnp.where(mask, huber, 0))


def _taken(heads: tuple[TokenStats, ...], mask, name: str) -> tuple[Array, ...]:
    """Q of the tokens that were taken, 0 off the actions."""
    for head in heads:
        check_sequence(f"{name}.logp", head.logp, mask.shape[0])
        check_sequence(f"{name}.lse", head.lse, mask.shape[0])
    return tuple(masked(head.logp, mask) + masked(head.lse, mask) for head in heads)


def _cross_entropy(heads: tuple[TokenStats, ...], mask) -> Array:
    return -sum(jnp.sum(masked(head.logp, mask)) for head in heads)


def _beyond(bootstrap, like) -> Array:
    return jnp.zeros((), like.dtype) if bootstrap is None else as_float32(bootstrap)


def _check(length: int, gamma, alpha, **arrays) -> None:
    check_discount(gamma)
    check_not_negative("alpha", alpha)
    for name, array in arrays.items():
        check_sequence(name, array, length)
