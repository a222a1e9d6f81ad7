"""Sequence-level regressions on the reward: at the KL-regularized optimum, R - beta logratio = V for all answers.

`logratio` is the log-ratio to the reference and `R` the reward, both summed over the actions of an answer. `V` depends
only on the prompt; the methods differ in how they estimate it. The answers to one prompt are passed as arrays of one
shape, with the answers on the last axis. Computed in float32 (float64 for float64 inputs). Mismatched shapes and Python
numbers out of range raise ValueError while tracing.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float

from shiq_jax.objectives.validation import as_float32, as_mask, check_positive, check_same_shape, masked


def vargrad_loss(
    logratios: Float[Array, "... K"], returns: Float[Array, "... K"], real: Bool[Array, "... K"], *, beta: ArrayLike
) -> Float[Array, "... K"]:
    """(ln Z + logratio - R / beta)^2 of each answer; ln Z is the detached mean of R / beta - logratio over the answers.

    Args:
      logratios, returns: log-ratios (nats) and returns (units of reward) of the answers to one prompt.
      real: mask of the answers; padding gets a loss of 0 and may hold any values.
      beta: temperature of the KL regularization, in units of reward per nat.

    Source: VarGrad (arXiv 2010.10436), Trajectory Balance with Asynchrony (2503.18929).
    """
    residuals, mask = _residuals(logratios, returns, real, beta)
    return _masked_square(residuals - jax.lax.stop_gradient(_mean(residuals, mask)), mask)


def group_mean_loss(
    logratios: Float[Array, "... K"], returns: Float[Array, "... K"], real: Bool[Array, "... K"], *, beta: ArrayLike
) -> Float[Array, "... K"]:
    """(logratio - (R - mean R) / beta)^2 of each answer: V is estimated by the mean reward.

    Averaged over the answers, it equals `vargrad_loss` plus the squared mean log-ratio, a penalty on drift. Arguments
    as in `vargrad_loss`.

    Source: Kimi k1.5 (arXiv 2501.12599, section 2.3).
    """
    residuals, mask = _residuals(logratios, returns, real, beta)
    return _masked_square(residuals + _mean(masked(returns, mask), mask) / beta, mask)


def a_star_po_loss(
    logratios: Float[Array, "... K"],
    returns: Float[Array, "... K"],
    real: Bool[Array, "... K"],
    *,
    beta: ArrayLike,
    value_beta: ArrayLike = 0.5,
) -> Float[Array, "... K"]:
    """(beta logratio + V - R)^2 of each answer, with V = value_beta ln mean exp(R / value_beta) over the answers.

    The answers must be samples of the reference. Other arguments as in `vargrad_loss`.

    Args:
      value_beta: temperature of V, the value of the prompt, > 0.

    Source: A*-PO (arXiv 2505.20686).
    """
    residuals, mask = _residuals(logratios, returns, real, beta)
    check_positive("value_beta", value_beta)
    scaled = jnp.where(mask, masked(returns, mask) / value_beta, -jnp.inf)
    log_mean = jax.nn.logsumexp(scaled, axis=-1, keepdims=True) - jnp.log(jnp.sum(mask, axis=-1, keepdims=True))
    return _masked_square(beta * residuals + jax.lax.stop_gradient(value_beta * log_mean), mask)


def copg_loss(
    chosen_logratio: Float[Array, "..."],
    rejected_logratio: Float[Array, "..."],
    chosen_return: Float[Array, "..."],
    rejected_return: Float[Array, "..."],
    *,
    beta: ArrayLike,
) -> Float[Array, "..."]:
    """-[(R_w - beta w / 2) - (R_l - beta l / 2)] (w - l) for log-ratios w, l and returns R_w, R_l of two answers.

    Nothing is detached. Its gradient equals that of the squared difference of residuals,
    [(R_w - beta w) - (R_l - beta l)]^2 / (2 beta), in which the value of the prompt cancels.

    Source: contrastive policy gradient (arXiv 2406.19185).
    """
    margin, return_margin = _margins(chosen_logratio, rejected_logratio, chosen_return, rejected_return, beta)
    return -(return_margin - beta * margin / 2) * margin


def rebel_loss(
    chosen_logratio: Float[Array, "..."],
    rejected_logratio: Float[Array, "..."],
    chosen_return: Float[Array, "..."],
    rejected_return: Float[Array, "..."],
    *,
    beta: ArrayLike,
) -> Float[Array, "..."]:
    """(beta (w - l) - (R_w - R_l))^2 for log-ratios w, l and returns R_w, R_l of two answers.

    beta is the paper's 1 / eta, and the reference is the policy at the start of the iteration.

    Source: REBEL (arXiv 2404.16767).
    """
    margin, return_margin = _margins(chosen_logratio, rejected_logratio, chosen_return, rejected_return, beta)
    return (beta * margin - return_margin) ** 2


def _residuals(logratios, returns, real, beta) -> tuple[Array, Array]:
    """logratio - R / beta, 0 for padding, and the mask."""
    check_same_shape(logratios=logratios, returns=returns)
    check_same_shape(logratios=logratios, real=real)
    check_positive("beta", beta)
    mask = as_mask(real)
    return masked(logratios, mask) - masked(returns, mask) / beta, mask


def _mean(values, mask) -> Array:
    return jnp.sum(values, axis=-1, keepdims=True) / jnp.maximum(jnp.sum(mask, axis=-1, keepdims=True), 1)


def _masked_square(values, mask) -> Array:
    return jnp.where(mask, values, 0) ** 2


def _margins(chosen_logratio, rejected_logratio, chosen_return, rejected_return, beta) -> tuple[Array, Array]:
    """Differences of the log-ratios and of the returns, chosen minus rejected."""
    check_same_shape(chosen_logratio=chosen_logratio, rejected_logratio=rejected_logratio)
    check_same_shape(chosen_return=chosen_return, rejected_return=rejected_return)
    check_positive("beta", beta)
    margin = as_float32(chosen_logratio) - as_float32(rejected_logratio)
    return margin, as_float32(chosen_return) - as_float32(rejected_return)
