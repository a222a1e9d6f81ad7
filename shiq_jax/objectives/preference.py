"""Losses on pairs of completions of one prompt, functions of log-ratios: log pi - log pi_ref, summed over actions.

All are elementwise: they take the log-ratios of the chosen and the rejected completion in nats, scalars or arrays of
one shape, and return a loss of that shape in float32 (float64 for float64 inputs). Mismatched shapes and Python numbers
out of range raise ValueError while tracing; traced options are not checked. Notation: w and l are the chosen and the
rejected log-ratio, d = w - l, and s is the logistic function.
"""

from numbers import Real

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from shiq_jax.objectives.validation import as_float32, check_choice, check_positive, check_same_shape

DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")

# exp of larger arguments overflows float32.
_MAX_EXPONENT = 80.0


def dpo_loss(
    chosen_logratio: Float[Array, "..."],
    rejected_logratio: Float[Array, "..."],
    *,
    beta: ArrayLike,
    label_smoothing: ArrayLike = 0.0,
) -> Float[Array, "..."]:
    """DPO loss: -(1 - eps) log s(beta d) - eps log s(-beta d).

    Args:
      chosen_logratio, rejected_logratio: log-ratios w and l, in nats.
      beta: temperature of the KL regularization, > 0.
      label_smoothing: eps in [0, 1/2), the assumed rate of flipped labels.

    Returns:
      The loss in nats; log 2 if the log-ratios are equal.

    Source: DPO (arXiv 2305.18290, eq. 7); with eps > 0 its conservative form cDPO.
    """
    logit = _logit(chosen_logratio, rejected_logratio, beta)
    _check_smoothing(label_smoothing)
    return -(1 - label_smoothing) * jax.nn.log_sigmoid(logit) - label_smoothing * jax.nn.log_sigmoid(-logit)


def dpo_norm_loss(
    chosen_logratio: Float[Array, "..."],
    rejected_logratio: Float[Array, "..."],
    chosen_length: ArrayLike,
    rejected_length: ArrayLike,
    *,
    beta: ArrayLike,
    label_smoothing: ArrayLike = 0.0,
) -> Float[Array, "..."]:
    """`dpo_loss` of log-ratios divided by the numbers of actions, so that long completions do not dominate.

    Source: length-normalized DPO of Tulu 3 (arXiv 2411.15124), TRL's "sigmoid_norm".
    """
    chosen, rejected = _pair(chosen_logratio, rejected_logratio)
    chosen, rejected = chosen / jnp.maximum(chosen_length, 1), rejected / jnp.maximum(rejected_length, 1)
    return dpo_loss(chosen, rejected, beta=beta, label_smoothing=label_smoothing)


def robust_loss(
    chosen_logratio: Float[Array, "..."],
    rejected_logratio: Float[Array, "..."],
    *,
    beta: ArrayLike,
    label_smoothing: ArrayLike = 0.0,
) -> Float[Array, "..."]:
    """DPO debiased for flipped labels: [-(1 - eps) log s(beta d) + eps log s(-beta d)] / (1 - 2 eps).

    Arguments as in `dpo_loss`. Source: arXiv 2403.00409.
    """
    logit = _logit(chosen_logratio, rejected_logratio, beta)
    _check_smoothing(label_smoothing)
    logp, flipped_logp = jax.nn.log_sigmoid(logit), jax.nn.log_sigmoid(-logit)
    return (label_smoothing * flipped_logp - (1 - label_smoothing) * logp) / (1 - 2 * label_smoothing)


def dpop_loss(
    chosen_logratio: Float[Array, "..."],
    rejected_logratio: Float[Array, "..."],
    *,
    beta: ArrayLike,
    penalty: ArrayLike = 5.0,
) -> Float[Array, "..."]:
    """DPO-Positive: -log s(beta (d - penalty max(0, -w))), which keeps the chosen completion likely.

    Args:
      penalty: weight of a decrease in the log-likelihood of the chosen completion.

    Source: arXiv 2402.13228.
    """
    logit = _logit(chosen_logratio, rejected_logratio, beta)
    return -jax.nn.log_sigmoid(logit - beta * penalty * jax.nn.relu(-as_float32(chosen_logratio)))


def hinge_loss(
    chosen_logratio: Float[Array, "..."], rejected_logratio: Float[Array, "..."], *, beta: ArrayLike
) -> Float[Array, "..."]:
    """Hinge loss: max(0, 1 - beta d). Source: SLiC (arXiv 2305.10425) in the form of RSO (arXiv 2309.06657)."""
    return jax.nn.relu(1 - _logit(chosen_logratio, rejected_logratio, beta))


def ipo_loss(
    chosen_logratio: Float[Array, "..."],
    rejected_logratio: Float[Array, "..."],
    chosen_length: ArrayLike = 1,
    rejected_length: ArrayLike = 1,
    *,
    beta: ArrayLike,
) -> Float[Array, "..."]:
    """IPO loss: (w / chosen_length - l / rejected_length - 1 / (2 beta))^2.

    Args:
      chosen_length, rejected_length: numbers of actions, for the length-normalized form that the authors recommend and
        TRL implements; the default of 1 gives the published form.
      beta: the paper's tau.

    Source: arXiv 2310.12036, eq. 17.
    """
    lengths = (jnp.maximum(length, 1) for length in (chosen_length, rejected_length))
    chosen, rejected = (x / length for x, length in zip(_pair(chosen_logratio, rejected_logratio), lengths))
    check_positive("beta", beta)
    return (chosen - rejected - 1 / (2 * beta)) ** 2


def exo_loss(
    chosen_logratio: Float[Array, "..."],
    rejected_logratio: Float[Array, "..."],
    *,
    beta: ArrayLike,
    label_smoothing: ArrayLike = 1e-3,
) -> Float[Array, "..."]:
    """EXO loss: KL(p || (1 - eps, eps)) with p = (s(beta d), s(-beta d)), the reverse of the KL that DPO minimizes.

    label_smoothing is eps in (0, 1/2). Source: EXO (arXiv 2402.00856, eq. 16).
    """
    logit = _logit(chosen_logratio, rejected_logratio, beta)
    _check_smoothing(label_smoothing)
    check_positive("label_smoothing", label_smoothing)
    logp, flipped_logp = jax.nn.log_sigmoid(logit), jax.nn.log_sigmoid(-logit)
    kl = jnp.exp(logp) * (logp - jnp.log1p(-label_smoothing))
    return kl + jnp.exp(flipped_logp) * (flipped_logp - jnp.log(label_smoothing))


def nca_loss(
    chosen_logratio: Float[Array, "..."], rejected_logratio: Float[Array, "..."], *, beta: ArrayLike
) -> Float[Array, "..."]:
    """NCA loss: -log s(beta w) - [log s(-beta w) + log s(-beta l)] / 2. Source: arXiv 2402.05369."""
    chosen, rejected = _rewards(chosen_logratio, rejected_logratio, beta)
    noise_terms = jax.nn.log_sigmoid(-chosen) + jax.nn.log_sigmoid(-rejected)
    return -jax.nn.log_sigmoid(chosen) - noise_terms / 2


def bco_loss(
    chosen_logratio: Float[Array, "..."],
    rejected_logratio: Float[Array, "..."],
    *,
    beta: ArrayLike,
    shift: ArrayLike = 0.0,
) -> Float[Array, "..."]:
    """BCO loss: -log s(beta w - shift) - log s(shift - beta l), a classifier of good and bad completions.

    Args:
      shift: reward that separates good and bad completions, such as the running mean of both rewards.

    Source: BCO (arXiv 2404.04656).
    """
    chosen, rejected = _rewards(chosen_logratio, rejected_logratio, beta)
    return -jax.nn.log_sigmoid(chosen - shift) - jax.nn.log_sigmoid(shift - rejected)


def sppo_hard_loss(
    chosen_logratio: Float[Array, "..."], rejected_logratio: Float[Array, "..."], *, beta: ArrayLike
) -> Float[Array, "..."]:
    """SPPO loss with hard labels: (w - 1 / (2 beta))^2 + (l + 1 / (2 beta))^2.

    Source: SPPO (arXiv 2405.00675, eq. 4.7 with win probabilities in {0, 1}).
    """
    chosen, rejected = _pair(chosen_logratio, rejected_logratio)
    check_positive("beta", beta)
    return (chosen - 0.5 / beta) ** 2 + (rejected + 0.5 / beta) ** 2


def apo_zero_loss(
    chosen_logratio: Float[Array, "..."], rejected_logratio: Float[Array, "..."], *, beta: ArrayLike
) -> Float[Array, "..."]:
    """APO-zero loss: 1 - s(beta w) + s(beta l); raises the chosen and lowers the rejected completion.

    Use it if chosen completions are better than the policy's own. Source: APO (arXiv 2408.06266, eq. 7).
    """
    chosen, rejected = _rewards(chosen_logratio, rejected_logratio, beta)
    return jax.nn.sigmoid(-chosen) + jax.nn.sigmoid(rejected)


def apo_down_loss(
    chosen_logratio: Float[Array, "..."], rejected_logratio: Float[Array, "..."], *, beta: ArrayLike
) -> Float[Array, "..."]:
    """APO-down loss: s(beta w) + 1 - s(beta d); lowers the chosen completion, and the rejected one more.

    Use it if chosen completions are worse than the policy's own. Source: APO (arXiv 2408.06266, eq. 8).
    """
    chosen, rejected = _rewards(chosen_logratio, rejected_logratio, beta)
    return jax.nn.sigmoid(chosen) + jax.nn.sigmoid(rejected - chosen)


def discopop_loss(
    chosen_logratio: Float[Array, "..."],
    rejected_logratio: Float[Array, "..."],
    *,
    beta: ArrayLike,
    tau: ArrayLike = 0.05,
) -> Float[Array, "..."]:
    """DiscoPOP loss: -(1 - u) log s(z) + u exp(-z) with z = beta d and u = s(z / tau).

    Args:
      tau: temperature of the blend of logistic and exponential loss, > 0.

    Source: DiscoPOP (arXiv 2406.08414, eq. 5).
    """
    logit = _logit(chosen_logratio, rejected_logratio, beta)
    check_positive("tau", tau)
    weight = jax.nn.sigmoid(logit / tau)
    # Clipping is harmless: where the exponential would overflow, its weight is 0.
    exponential = jnp.exp(jnp.minimum(-logit, _MAX_EXPONENT))
    return (weight - 1) * jax.nn.log_sigmoid(logit) + weight * exponential


def divergence_score(logratio: Float[Array, "..."], *, kind: str, alpha: ArrayLike = 1.0) -> Float[Array, "..."]:
    """f-divergence replacement for the log-ratio u of a completion (f-DPO).

    Pass the scores of both completions to a loss of this module that depends only on their difference.

    Args:
      logratio: u, in nats.
      kind: "reverse_kl" (score u), "forward_kl" (-exp(-u)), "js_divergence" (log s(u)) or "alpha_divergence"
        ((exp((alpha - 1) u) - 1) / (alpha - 1), shifted by a constant to be exact near alpha = 1; the constant cancels
        in the difference of two scores).
      alpha: alpha of "alpha_divergence", a Python number; the score at alpha = 1 is u.

    Source: f-DPO (arXiv 2309.16240).
    """
    check_choice("kind", kind, DIVERGENCES)
    u = as_float32(logratio)
    if kind == "js_divergence":
        return jax.nn.log_sigmoid(u)
    if kind == "forward_kl":
        return -jnp.exp(jnp.minimum(-u, _MAX_EXPONENT))
    if kind == "alpha_divergence" and alpha != 1:
        return jnp.expm1(jnp.minimum((alpha - 1) * u, _MAX_EXPONENT)) / (alpha - 1)
    return u


def _pair(chosen_logratio, rejected_logratio) -> tuple[Array, Array]:
    check_same_shape(chosen_logratio=chosen_logratio, rejected_logratio=rejected_logratio)
    return as_float32(chosen_logratio), as_float32(rejected_logratio)


def _rewards(chosen_logratio, rejected_logratio, beta) -> tuple[Array, Array]:
    chosen, rejected = _pair(chosen_logratio, rejected_logratio)
    check_positive("beta", beta)
    return beta * chosen, beta * rejected


def _logit(chosen_logratio, rejected_logratio, beta) -> Array:
    chosen, rejected = _pair(chosen_logratio, rejected_logratio)
    check_positive("beta", beta)
    return beta * (chosen - rejected)


def _check_smoothing(label_smoothing) -> None:
    if isinstance(label_smoothing, Real) and not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing is {label_smoothing} but must lie in [0, 0.5).")
