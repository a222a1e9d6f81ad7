"""Losses on pairs of completions to one prompt, as functions of log-ratios: log pi - log pi_ref, summed over actions.

All take the chosen and the rejected completion's log-ratio in nats, scalars or arrays of one shape (then elementwise),
and what else their formula needs, by name; all return the same shape in fp32 (fp64 for fp64). All raise ValueError
while tracing for shapes that disagree and for Python numbers out of range; options may be traced, then nothing is
checked. `d` stands for chosen_logratio - rejected_logratio, `s` for the logistic function.
"""

from numbers import Real

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from shiq_jax.objectives.validation import as_float32, check_choice, check_positive, same_shape

DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")

# exp of more overflows float32.
_LARGEST_EXPONENT = 80.0


def dpo_loss(
    chosen_logratio: Float[Array, "..."],
    rejected_logratio: Float[Array, "..."],
    *,
    beta: ArrayLike,
    label_smoothing: ArrayLike = 0.0,
) -> Float[Array, "..."]:
    """The DPO loss of a pair: how little the policy has learnt to tell the chosen from the rejected completion.

        -(1 - eps) log s(beta d) - eps log s(-beta d)

    Args:
      chosen_logratio, rejected_logratio: as the module says.
      beta: temperature of the KL regularisation, > 0.
      label_smoothing: eps in [0, 1/2), the assumed rate of wrong labels.

    Returns:
      The loss in nats, log 2 when the log-ratios agree.

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
    """`dpo_loss` of log-ratios per action, so that long completions weigh no more; lengths count actions.

    Source: length-normalised DPO of Tulu 3 (arXiv 2411.15124), TRL's "sigmoid_norm".
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
    """DPO with its bias under flipped labels removed: [-(1 - eps) log s(beta d) + eps log s(-beta d)] / (1 - 2 eps).

    Args as `dpo_loss`. Source: arXiv 2403.00409.
    """
    logit = _logit(chosen_logratio, rejected_logratio, beta)
    _check_smoothing(label_smoothing)
    right, flipped = jax.nn.log_sigmoid(logit), jax.nn.log_sigmoid(-logit)
    return (label_smoothing * flipped - (1 - label_smoothing) * right) / (1 - 2 * label_smoothing)


def dpop_loss(
    chosen_logratio: Float[Array, "..."],
    rejected_logratio: Float[Array, "..."],
    *,
    beta: ArrayLike,
    penalty: ArrayLike = 5.0,
) -> Float[Array, "..."]:
    """DPO-Positive: -log s(beta (d - penalty max(0, -chosen_logratio))), which keeps the chosen completion likely.

    Args:
      penalty: cost of a chosen completion that becomes less likely.

    Source: arXiv 2402.13228.
    """
    margin = _logit(chosen_logratio, rejected_logratio, beta)
    return -jax.nn.log_sigmoid(margin - beta * penalty * jax.nn.relu(-as_float32(chosen_logratio)))


def hinge_loss(
    chosen_logratio: Float[Array, "..."], rejected_logratio: Float[Array, "..."], *, beta: ArrayLike
) -> Float[Array, "..."]:
    """max(0, 1 - beta d). Source: SLiC (arXiv 2305.10425) in the form of RSO (arXiv 2309.06657)."""
    return jax.nn.relu(1 - _logit(chosen_logratio, rejected_logratio, beta))


def ipo_loss(
    chosen_logratio: Float[Array, "..."],
    rejected_logratio: Float[Array, "..."],
    chosen_length: ArrayLike = 1,
    rejected_length: ArrayLike = 1,
    *,
    beta: ArrayLike,
) -> Float[Array, "..."]:
    """(chosen_logratio / chosen_length - rejected_logratio / rejected_length - 1 / (2 beta))^2.

    Args:
      chosen_length, rejected_length: actions of either completion, for the form that its authors recommend and TRL
        computes; 1, the default, gives the printed one.
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
    """KL(p || (1 - eps, eps)) of p = (s(beta d), s(-beta d)): DPO with the divergence turned round.

    label_smoothing is eps and must be positive. Source: EXO (arXiv 2402.00856, eq. 16).
    """
    logit = _logit(chosen_logratio, rejected_logratio, beta)
    _check_smoothing(label_smoothing)
    check_positive("label_smoothing", label_smoothing)
    right, flipped = jax.nn.log_sigmoid(logit), jax.nn.log_sigmoid(-logit)
    kept = jnp.exp(right) * (right - jnp.log1p(-label_smoothing))
    return kept + jnp.exp(flipped) * (flipped - jnp.log(label_smoothing))


def nca_loss(
    chosen_logratio: Float[Array, "..."], rejected_logratio: Float[Array, "..."], *, beta: ArrayLike
) -> Float[Array, "..."]:
    """-log s(beta w) - [log s(-beta w) + log s(-beta l)] / 2 of log-ratios w, l. Source: NCA (arXiv 2402.05369)."""
    chosen, rejected = _rewards(chosen_logratio, rejected_logratio, beta)
    noise = jax.nn.log_sigmoid(-chosen) + jax.nn.log_sigmoid(-rejected)
    return -jax.nn.log_sigmoid(chosen) - noise / 2


def bco_loss(
    chosen_logratio: Float[Array, "..."],
    rejected_logratio: Float[Array, "..."],
    *,
    beta: ArrayLike,
    shift: ArrayLike = 0.0,
) -> Float[Array, "..."]:
    """-log s(beta w - shift) - log s(shift - beta l) of log-ratios w, l: a classifier of good and bad completions.

    Args:
      shift: reward between good and bad completions, such as the running mean of both rewards.

    Source: BCO (arXiv 2404.04656).
    """
    chosen, rejected = _rewards(chosen_logratio, rejected_logratio, beta)
    return -jax.nn.log_sigmoid(chosen - shift) - jax.nn.log_sigmoid(shift - rejected)


def sppo_hard_loss(
    chosen_logratio: Float[Array, "..."], rejected_logratio: Float[Array, "..."], *, beta: ArrayLike
) -> Float[Array, "..."]:
    """(w - 1 / (2 beta))^2 + (l + 1 / (2 beta))^2 of log-ratios w, l: the winner wins always.

    Source: SPPO (arXiv 2405.00675, eq. 4.7 with P in {0, 1}).
    """
    chosen, rejected = _pair(chosen_logratio, rejected_logratio)
    check_positive("beta", beta)
    return (chosen - 0.5 / beta) ** 2 + (rejected + 0.5 / beta) ** 2


def apo_zero_loss(
    chosen_logratio: Float[Array, "..."], rejected_logratio: Float[Array, "..."], *, beta: ArrayLike
) -> Float[Array, "..."]:
    """1 - s(beta w) + s(beta l) of log-ratios w, l: raises the chosen, lowers the rejected completion.

    For chosen completions better than the policy's own. Source: APO (arXiv 2408.06266, eq. 7).
    """
    chosen, rejected = _rewards(chosen_logratio, rejected_logratio, beta)
    return jax.nn.sigmoid(-chosen) + jax.nn.sigmoid(rejected)


def apo_down_loss(
    chosen_logratio: Float[Array, "..."], rejected_logratio: Float[Array, "..."], *, beta: ArrayLike
) -> Float[Array, "..."]:
    """s(beta w) + 1 - s(beta d): lowers the chosen completion, and the rejected one more.

    For chosen completions worse than the policy's own. Source: APO (arXiv 2408.06266, eq. 8).
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
    """(1 - w) (-log s(z)) + w exp(-z) with z = beta d and w = s(z / tau): a blend that a language model discovered.

    Args:
      tau: how gradually the two parts are blended, > 0.

    Source: DiscoPOP (arXiv 2406.08414, eq. 5).
    """
    logit = _logit(chosen_logratio, rejected_logratio, beta)
    check_positive("tau", tau)
    weight = jax.nn.sigmoid(logit / tau)
    # Where the exponential would overflow its weight is 0, whatever tau.
    exponential = jnp.exp(jnp.minimum(-logit, _LARGEST_EXPONENT))
    return (weight - 1) * jax.nn.log_sigmoid(logit) + weight * exponential


def divergence_score(logratio: Float[Array, "..."], *, kind: str, alpha: ArrayLike = 1.0) -> Float[Array, "..."]:
    """What stands for the log-ratio u of a completion when DPO is derived from another f-divergence than the KL.

    Put the scores of both completions into a loss of this module that reads their difference.

    Args:
      logratio: u, in nats.
      kind: "reverse_kl", u; "forward_kl", -exp(-u); "js_divergence", log s(u); "alpha_divergence",
        exp((alpha - 1) u) / (alpha - 1).
      alpha: of the last, a number; at 1 it is u.

    Source: f-DPO (arXiv 2309.16240).
    """
    check_choice("kind", kind, DIVERGENCES)
    u = as_float32(logratio)
    if kind == "js_divergence":
        return jax.nn.log_sigmoid(u)
    if kind == "forward_kl":
        return -jnp.exp(jnp.minimum(-u, _LARGEST_EXPONENT))
    if kind == "alpha_divergence" and alpha != 1:
        return jnp.exp(jnp.minimum((alpha - 1) * u, _LARGEST_EXPONENT)) / (alpha - 1)
    return u


def _pair(chosen_logratio, rejected_logratio) -> tuple[Array, Array]:
    same_shape(chosen_logratio=chosen_logratio, rejected_logratio=rejected_logratio)
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
