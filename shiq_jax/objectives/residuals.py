"""Soft Bellman residuals of a language model's logits, and the ShiQ loss.

The logits l are interpreted as Q-values relative to a frozen reference l_ref: q(s, a) = beta (l - l_ref)(s, a). The
value of a state is then v(s) = beta (lse l - lse l_ref)(s), the policy remains softmax(l), and all values are zero at
l = l_ref. The policy that maximizes E[sum_t gamma^(t-1) x_t] satisfies the soft Bellman equation at every action:

    v(s_t) = x_t + gamma v(s_{t+1})      with      x_t = r_t - beta log(pi / pi_ref)(y_t | s_t).

A residual is the right side minus the left side. "Next" always means the next *action*: tokens that the model did not
choose carry no reward and are not discounted.
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


class ResidualOptions(NamedTuple):
    """Options of `bellman_residuals`.

    Fields:
      horizon: span of a residual: to the end, one action, from the first action only, or n actions.
      n: the number of steps of "n_step", a Python integer; None otherwise.
      value: definition of V. "lse_shift": beta (lse - lse_ref), as in ShiQ. "lse": beta lse. "given": `values`.
        "none": 0.
      values: V for "given", [T], or a scalar V(s_1) for "trajectory": value heads, offline values, group or pair
        baselines. Gradients flow into them; apply `stop_gradient` if they should not.
      bootstrap: scalar V of the state at which a sequence was truncated, used after its last action instead of 0; None
        for complete sequences.
      gradient: "full" differentiates all terms; "semi" stops the gradient of all terms after action t, which is
        unbiased under stochastic users or tools. The values are the same.
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
    """ShiQ loss of one sequence: the squared multi-step residual, summed over actions.

    With logratio_t = log pi - log pi_ref of the token taken and value v_t = beta (lse - lse_ref),

        D_t = sum_{k >= t} gamma^(k-t) (r_k - beta logratio_k) - v_t        over actions k,      loss = sum_t D_t^2.

    On data with full support, from any sampler, the minimizer is the policy that maximizes the expected discounted
    reward minus beta times the log-ratio to the reference. The loss needs no sampler probabilities, target network or
    value head. The reference gets no gradient, so its two floats per token can be computed once and stored.

    For a batch, apply `jax.vmap` and average over sequences.

    Args:
      policy: statistics [T] of the trained model: entry t describes the prediction *of* token t. From `token_stats`,
        or from `token_stats_from_logits(logits[:-1], tokens[1:])`. `lse` must come from raw logits: for
        log-probabilities it is always 0, and the error goes unnoticed.
      reference: statistics of the reference model on the same tokens; None for zeros.
      rewards: [T], the reward for emitting token t; read at actions only. A reward for the whole sequence belongs to
        its last action, a reward for a turn to the last action of the turn.
      action_mask: [T], True (or 1) where the model chose the token, including the end-of-sequence token. At other
        positions (prompt, user, tool, padding) the other arrays may hold any values, including infinities and NaN.
      beta: temperature > 0, in units of reward per nat.
      gamma: discount in (0, 1] per action.
      normalisation: "sum_t" sums over actions, "mean_t" divides by their number.
      position_weight: "inv_position" weights the square of the k-th action by 1/k, because a final reward otherwise
        gives the k-th action k times the gradient.

    Returns:
      A scalar in squared units of reward; 0 for a sequence without actions. Computed in float32 (float64 for float64
      inputs).

    Raises:
      ValueError: while tracing, for mismatched shapes and options out of range. beta and gamma may be traced; only
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
    **options: Any,
) -> Float[Array, " T"]:
    """Soft Bellman residuals at the actions of one sequence: target minus value of the state.

    With x_t = r_t - beta (log pi - log pi_ref) and V the value of a state, the residual at action t is

        sum_{k=t}^{h} gamma^(k-t) x_k + gamma^(h-t+1) V(s_{h+1}) - V(s_t),        V = 0 after the last action,

    with h = t for "one", t + n - 1 for "n_step" and the last action for "multi". "trajectory" keeps only the multi-step
    residual of the first action and sets the others to 0.

    Args:
      policy, reference, rewards, action_mask, beta, gamma: as in `shiq_loss`.
      options: `horizon`, `n`, `value`, `values`, `bootstrap` and `gradient`; see `ResidualOptions`.

    Returns:
      [T] in units of reward, 0 at other tokens. Computed in float32 (float64 for float64 inputs).

    Raises:
      ValueError: while tracing, for mismatched shapes, options out of range, and "semi" with "trajectory", which would
        train the first token only.

    Source: ShiQ (arXiv 2505.11081) for "multi" with "lse_shift"; ReVal (2603.23355), TBRM (2505.15311), OREO
      (2412.16145), PCL (1702.08892) and DRO (2405.19107) correspond to other options.
    """
    horizon, n, value, values, bootstrap, gradient = parsed = ResidualOptions(**options)
    check_residual_options(parsed)
    check_positive("beta", beta)
    check_discount(gamma)
    _check_arrays(policy, reference, rewards, parsed, sequence_length(action_mask))
    mask = as_mask(action_mask)

    soft_rewards = masked(rewards, mask) - beta * logratios(policy, reference, mask)
    v = state_values(policy, reference, mask, beta=beta, value=value, values=values)
    final_value = jnp.zeros((), soft_rewards.dtype) if bootstrap is None else as_float32(bootstrap)
    if horizon in ("multi", "trajectory"):
        targets = discounted_returns(soft_rewards, final_value, mask, gamma)
    else:
        targets = _n_step_targets(soft_rewards, v, final_value, mask, gamma, 1 if horizon == "one" else n)
    if gradient == "semi":
        targets = soft_rewards + lax.stop_gradient(targets - soft_rewards)
    output_mask = mask & (jnp.cumsum(mask) == 1) if horizon == "trajectory" else mask
    return jnp.where(output_mask, targets - v, 0)


def squared_residuals(
    residuals: Float[Array, " T"],
    action_mask: Bool[Array, " T"],
    *,
    normalisation: Literal["sum_t", "mean_t"] = "sum_t",
    position_weight: Literal["none", "inv_position"] = "none",
) -> Float[Array, ""]:
    """Sum or mean of the squared residuals over the actions of one sequence; options as in `shiq_loss`."""
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
    """V of the state before each action, 0 at other tokens; arguments, not checked here, as in `bellman_residuals`."""
    mask = as_mask(action_mask)
    if value == "none":
        return jnp.zeros(mask.shape, jnp.float32)
    if value == "given":
        return masked(values, mask)
    lse = masked(policy.lse, mask)
    if value == "lse_shift" and reference is not None:
        lse = lse - masked(lax.stop_gradient(reference.lse), mask)
    return beta * lse


def discounted_returns(
    rewards: Float[Array, " T"], final_value: Float[Array, ""], mask: Bool[Array, " T"], gamma: ArrayLike
) -> Float[Array, " T"]:
    """G_t = r_t + gamma G_{t+1} over actions, from `final_value`; other tokens copy the next action's return."""
    if isinstance(gamma, Real) and gamma == 1:
        return reverse_cumsum(rewards) + final_value
    return _reverse_affine_scan(jnp.where(mask, gamma, 1).astype(rewards.dtype), rewards, final_value)


def _n_step_targets(soft_rewards, values, final_value, mask, gamma, n: int) -> Float[Array, " T"]:
    """n Bellman backups, which avoid the cancellation of differences of long sums."""

    def backup(values):
        return soft_rewards + gamma * next_action_values(values, final_value, mask)

    # T backups reach the end of a sequence of T tokens. The first one, outside the loop, fixes the dtype of the carry.
    return lax.fori_loop(1, min(n, mask.shape[0]), lambda _, targets: backup(targets), backup(values))


def next_action_values(
    values: Float[Array, " T"], final_value: Float[Array, ""], mask: Bool[Array, " T"]
) -> Float[Array, " T"]:
    """Value at the next action after each position, `final_value` after the last; read at actions only."""
    carry = jnp.where(mask, 0, 1).astype(values.dtype)
    current_or_next = _reverse_affine_scan(carry, jnp.where(mask, values, 0), final_value)
    return jnp.append(current_or_next[1:], final_value.astype(values.dtype))


def _reverse_affine_scan(scale: Array, shift: Array, final: Array) -> Float[Array, " T"]:
    """y_t = scale_t y_{t+1} + shift_t from y_{T+1} = final, in log(T) parallel steps."""

    def compose(later, earlier):
        return earlier[0] * later[0], earlier[0] * later[1] + earlier[1]

    scales, shifts = lax.associative_scan(compose, (scale, shift), reverse=True)
    return scales * final + shifts


def check_residual_options(options: ResidualOptions) -> None:
    """Raise ValueError for options out of range and invalid combinations."""
    horizon, n, value, values, _, gradient = options
    check_choice("horizon", horizon, ("multi", "one", "trajectory", "n_step"))
    check_choice("value", value, ("lse_shift", "lse", "given", "none"))
    check_choice("gradient", gradient, ("full", "semi"))
    if (horizon == "n_step") != (n is not None):
        raise ValueError(
            f"n is {n} with horizon={horizon!r}; n is required by horizon='n_step' and not allowed otherwise."
        )
    if n is not None and not (isinstance(n, Integral) and n >= 1):
        raise ValueError(f"n is {n} but must be a Python integer of at least 1.")
    if (value == "given") != (values is not None):
        state = "missing" if values is None else "present"
        raise ValueError(
            f"values are {state} with value={value!r}; they are required by value='given' and not allowed otherwise."
        )
    if horizon == "trajectory" and gradient == "semi":
        raise ValueError("gradient='semi' with horizon='trajectory' would train the first token only; use 'full'.")


def _check_arrays(policy, reference, rewards, options: ResidualOptions, length: int) -> None:
    check_sequence("rewards", rewards, length)
    check_sequence("policy.logp", policy.logp, length)
    if options.value in ("lse", "lse_shift"):
        check_sequence("policy.lse", policy.lse, length)
    if reference is not None:
        check_sequence("reference.logp", reference.logp, length)
        if options.value == "lse_shift":
            check_sequence("reference.lse", reference.lse, length)
    if options.values is not None and not (options.horizon == "trajectory" and jnp.ndim(options.values) == 0):
        check_sequence("values", options.values, length)
    if options.bootstrap is not None and jnp.ndim(options.bootstrap) != 0:
        raise ValueError(f"bootstrap has shape {jnp.shape(options.bootstrap)} but must be one scalar per sequence.")
