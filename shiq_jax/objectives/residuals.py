"""ShiQ: Q-learning on a language model's own logits, as one residual function with its axes, and the loss on top.

A language model's logits l are read as Q-values relative to a fixed reference l_ref: q(s, a) = beta (l - l_ref)(s, a),
so that the value of a state is v(s) = beta (lse l - lse l_ref)(s), sampling stays softmax(l), and at l = l_ref all
values are zero. Along a trajectory the soft Bellman equation then says that

    x_t = r_t - beta log(pi / pi_ref)(y_t | s_t)      and      v(s_t) = x_t + gamma v(s_{t+1})

at every action of the optimal policy of E[sum_t gamma^(t-1) x_t]. A residual is the right side less the left. "Next"
always means the next *action*: tokens that the model did not choose neither discount nor carry reward.
"""

from numbers import Integral, Real
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, Float

from shiq_jax.objectives.cumulative import reverse_cumsum
from shiq_jax.objectives.types import TokenStats
from shiq_jax.objectives.validation import (
    as_float32,
    as_mask,
    check_choice,
    check_discount,
    check_positive,
    check_sequence,
    logratios,
    masked,
    sequence_length,
)


class Axes(NamedTuple):
    """The axes of `bellman_residuals`.

    Fields:
      horizon: how far a residual looks: to the end, one action, from the first action only, or n actions.
      n: the number of steps of "n_step", a Python integer; None otherwise.
      value: what V is. "lse_shift": beta (lse - lse_ref), the shifted value of ShiQ. "lse": beta lse, without the
        shift. "given": `values`. "none": 0.
      values: V for "given", [T], or a scalar V(s_1) for "trajectory": value heads, offline values, group or pair
        baselines. Gradients flow; stop them outside where they should not.
      bootstrap: scalar V of the state in which a truncated sequence was cut, instead of the zero after its last
        action; None for complete sequences.
      gradient: "full" differentiates everything; "semi" takes all that lies after action t as a constant, which stays
        unbiased when users or tools answer at random. The values are the same.
    """

    horizon: Literal["multi", "one", "trajectory", "n_step"] = "multi"
    n: int | None = None
    value: Literal["lse_shift", "lse", "given", "none"] = "lse_shift"
    values: Float[Array, " T"] | Float[Array, ""] | None = None
    bootstrap: Float[Array, ""] | None = None
    gradient: Literal["full", "semi"] = "full"


def shiq_loss(
    policy: TokenStats,
    reference: TokenStats | None,
    rewards: Float[Array, " T"],
    action_mask: Bool[Array, " T"],
    *,
    beta: ArrayLike,
    gamma: ArrayLike = 1.0,
    normalisation: Literal["sum_t", "mean_t"] = "sum_t",
    position_weight: Literal["none", "inv_position"] = "none",
) -> Float[Array, ""]:
    """The ShiQ loss of one sequence: the sum over its actions of the squared multi-step residual.

    With log-ratio lr_t = log pi - log pi_ref of the token taken and value v_t = beta (lse - lse_ref),

        D_t = sum_{k >= t} gamma^(k-t) (r_k - beta lr_k) - v_t        over actions k,        loss = sum_t D_t^2.

    It is minimised over full-support data, whoever sampled them, by the policy that maximises the expected discounted
    reward less beta times the log-ratio to the reference. No sampler probabilities, target network or value head are
    needed, and no gradient reaches the reference: its two floats per token can be computed once and stored.

    For a batch, `jax.vmap` this and take the mean over sequences.

    Args:
      policy: statistics [T] of the trained model: entry t describes the prediction *of* token t. From `token_stats`,
        or from `token_stats_from_logits(logits[:-1], tokens[1:])` of raw logits. `lse` must be that of raw logits:
        log-probabilities have lost the value, silently.
      reference: the same of the reference model on the same tokens; None for zeros.
      rewards: [T], the reward for emitting token t; read at actions only. A reward for the whole sequence stands at its
        last action, a turn's reward at the turn's last action.
      action_mask: [T], true (or 1) where the model chose the token, the end-of-sequence token included. Elsewhere
        (prompt, user, tool, padding) the other arrays may hold anything, also infinities and NaN.
      beta: temperature > 0, in units of reward per nat.
      gamma: discount in (0, 1] per action.
      normalisation: "sum_t" adds over actions, "mean_t" divides by their number.
      position_weight: "inv_position" weights the k-th action's square by 1/k, against the k-fold push that late actions
        otherwise receive from a final reward.

    Returns:
      A scalar in squared units of reward; 0 for a sequence without actions. Computed in fp32 (fp64 for fp64).

    Raises:
      ValueError: while tracing, for shapes that disagree and options out of range. beta and gamma may be traced; only
        Python numbers are range-checked.

    Source: ShiQ (arXiv 2505.11081). The first term of the sum is the loss of ReVal (arXiv 2603.23355).
    """
    residuals = bellman_residuals(policy, reference, rewards, action_mask, beta=beta, gamma=gamma)
    return squared_residuals(residuals, action_mask, normalisation=normalisation, position_weight=position_weight)


def bellman_residuals(
    policy: TokenStats,
    reference: TokenStats | None,
    rewards: Float[Array, " T"],
    action_mask: Bool[Array, " T"],
    *,
    beta: ArrayLike,
    gamma: ArrayLike = 1.0,
    **axes: Any,
) -> Float[Array, " T"]:
    """Soft Bellman residuals at the actions of one sequence: what follows a state, less the state's value.

    With x_t = r_t - beta (log pi - log pi_ref) and V the value of a state, the residual at action t is

        sum_{k=t}^{h} gamma^(k-t) x_k + gamma^(h-t+1) V(s_{h+1}) - V(s_t),        V = 0 after the last action,

    with h = t for "one", t + n - 1 for "n_step", the last action for "multi"; "trajectory" keeps the first action's
    multi-step residual and sets the others to 0.

    Args:
      policy, reference, rewards, action_mask, beta, gamma: as in `shiq_loss`.
      axes: `horizon`, `n`, `value`, `values`, `bootstrap` and `gradient`, by name; see `Axes`.

    Returns:
      [T] in units of reward, 0 off the actions. Computed in fp32 (fp64 for fp64).

    Raises:
      ValueError: while tracing, for shapes that disagree, options out of range, and "semi" with "trajectory" (it would
        train the first token only).

    Source: ShiQ (arXiv 2505.11081) for "multi" with "lse_shift"; ReVal (2603.23355), TBRM (2505.15311), OREO
      (2412.16145), PCL (1702.08892) and DRO (2405.19107) are other points of the same axes.
    """
    horizon, n, value, values, bootstrap, gradient = chosen = Axes(**axes)
    check_axes(chosen)
    check_positive("beta", beta)
    check_discount(gamma)
    _check_arrays(policy, reference, rewards, chosen, sequence_length(action_mask))
    mask = as_mask(action_mask)

    soft_rewards = masked(rewards, mask) - beta * logratios(policy, reference, mask)
    before = state_values(policy, reference, mask, beta=beta, value=value, values=values)
    beyond = jnp.zeros((), soft_rewards.dtype) if bootstrap is None else as_float32(bootstrap)
    if horizon in ("multi", "trajectory"):
        targets = suffix_sum(soft_rewards, beyond, mask, gamma)
    else:
        targets = _backups(soft_rewards, before, beyond, mask, gamma, 1 if horizon == "one" else n)
    if gradient == "semi":
        targets = soft_rewards + lax.stop_gradient(targets - soft_rewards)
    kept = mask & (jnp.cumsum(mask) == 1) if horizon == "trajectory" else mask
    return jnp.where(kept, targets - before, 0)


def squared_residuals(
    residuals: Float[Array, " T"],
    action_mask: Bool[Array, " T"],
    *,
    normalisation: Literal["sum_t", "mean_t"] = "sum_t",
    position_weight: Literal["none", "inv_position"] = "none",
) -> Float[Array, ""]:
    """The sum (or mean) over the actions of one sequence of its squared residuals; options as in `shiq_loss`."""
    check_sequence("residuals", residuals, sequence_length(action_mask))
    check_choice("normalisation", normalisation, ("sum_t", "mean_t"))
    check_choice("position_weight", position_weight, ("none", "inv_position"))
    mask = as_mask(action_mask)
    squares = masked(residuals, mask) ** 2
    if position_weight == "inv_position":
        squares = squares / jnp.maximum(jnp.cumsum(mask), 1)
    total = jnp.sum(squares)
    return total / jnp.maximum(jnp.sum(mask), 1) if normalisation == "mean_t" else total


def state_values(
    policy: TokenStats,
    reference: TokenStats | None,
    action_mask: Bool[Array, " T"],
    *,
    beta: ArrayLike,
    value: str = "lse_shift",
    values: Float[Array, " T"] | Float[Array, ""] | None = None,
) -> Float[Array, " T"]:
    """V of the state before each action, 0 off the actions; arguments as in `bellman_residuals`, which checks them."""
    mask = as_mask(action_mask)
    if value == "none":
        return jnp.zeros(mask.shape, jnp.float32)
    if value == "given":
        return masked(values, mask)
    lse = masked(policy.lse, mask)
    if value == "lse_shift" and reference is not None:
        lse = lse - masked(lax.stop_gradient(reference.lse), mask)
    return beta * lse


def suffix_sum(
    x: Float[Array, " T"], beyond: Float[Array, ""], mask: Bool[Array, " T"], gamma: ArrayLike
) -> Float[Array, " T"]:
    """S_t = x_t + gamma S_{t+1} over actions, from `beyond` after the last; carried unchanged over the rest."""
    if isinstance(gamma, Real) and gamma == 1:
        return reverse_cumsum(x) + beyond
    return _reverse_affine(jnp.where(mask, gamma, 1).astype(x.dtype), x, beyond)


def _backups(x, values, beyond, mask, gamma, n: int) -> Float[Array, " T"]:
    """The n-step target as n Bellman backups, values <- x + gamma values(next action); no large sums cancel."""

    def backup(values):
        return x + gamma * next_action(values, beyond, mask)

    # A sequence of T positions is at its end after T steps. The first backup gives the loop's carry its type.
    return lax.fori_loop(1, min(n, mask.shape[0]), lambda _, targets: backup(targets), backup(values))


def next_action(y: Float[Array, " T"], beyond: Float[Array, ""], mask: Bool[Array, " T"]) -> Float[Array, " T"]:
    """y of the next action after each position, `beyond` after the last; y is read at actions only."""
    from_here = _reverse_affine(jnp.where(mask, 0, 1).astype(y.dtype), jnp.where(mask, y, 0), beyond)
    return jnp.append(from_here[1:], beyond.astype(y.dtype))


def _reverse_affine(scale: Array, shift: Array, beyond: Array) -> Float[Array, " T"]:
    """y_t = scale_t y_{t+1} + shift_t from y_{T+1} = beyond, in log(T) parallel steps."""

    def compose(later, earlier):
        return earlier[0] * later[0], earlier[0] * later[1] + earlier[1]

    scales, shifts = lax.associative_scan(compose, (scale, shift), reverse=True)
    return scales * beyond + shifts


def check_axes(axes: Axes) -> None:
    """Raises ValueError for axes of `bellman_residuals` that are out of range or do not go together."""
    horizon, n, value, values, _, gradient = axes
    check_choice("horizon", horizon, ("multi", "one", "trajectory", "n_step"))
    check_choice("value", value, ("lse_shift", "lse", "given", "none"))
    check_choice("gradient", gradient, ("full", "semi"))
    if (horizon == "n_step") != (n is not None):
        raise ValueError(f"n is {n} with horizon={horizon!r}; give n with horizon='n_step' and with no other.")
    if n is not None and not (isinstance(n, Integral) and n >= 1):
        raise ValueError(f"n is {n} but must be a Python integer of at least 1.")
    if (value == "given") != (values is not None):
        found = "absent" if values is None else "present"
        raise ValueError(f"values are {found} with value={value!r}; give values with value='given' and with no other.")
    if horizon == "trajectory" and gradient == "semi":
        raise ValueError("gradient='semi' with horizon='trajectory' would train the first token only; use 'full'.")


def _check_arrays(policy, reference, rewards, axes: Axes, length: int) -> None:
    check_sequence("rewards", rewards, length)
    check_sequence("policy.logp", policy.logp, length)
    if axes.value in ("lse", "lse_shift"):
        check_sequence("policy.lse", policy.lse, length)
    if reference is not None:
        check_sequence("reference.logp", reference.logp, length)
        if axes.value == "lse_shift":
            check_sequence("reference.lse", reference.lse, length)
    if axes.values is not None and not (axes.horizon == "trajectory" and jnp.ndim(axes.values) == 0):
        check_sequence("values", axes.values, length)
    if axes.bootstrap is not None and jnp.ndim(axes.bootstrap) != 0:
        raise ValueError(f"bootstrap has shape {jnp.shape(axes.bootstrap)} but must be one scalar per sequence.")
