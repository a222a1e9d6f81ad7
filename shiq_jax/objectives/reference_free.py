"""Reference-free losses on pairs, functions of log-probabilities in nats: log pi, summed over actions.

Shapes, types, errors and `s` as in `preference`.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from shiq_jax.objectives.preference import dpo_loss
from shiq_jax.objectives.validation import as_float32, check_positive, check_same_shape

# Keeps p below 1, where the odds p / (1 - p) are infinite.
_MAX_AVERAGE_LOGP = -1e-6


def cpo_loss(
    chosen_logp: Float[Array, "..."],
    rejected_logp: Float[Array, "..."],
    *,
    beta: ArrayLike,
    alpha: ArrayLike = 1.0,
    label_smoothing: ArrayLike = 0.0,
) -> Float[Array, "..."]:
    """`dpo_loss` of log-probabilities instead of log-ratios, minus alpha chosen_logp.

    Args:
      beta: scale of the difference inside the sigmoid, > 0.
      alpha: weight of the chosen completion's log-likelihood.

    Source: CPO (arXiv 2401.08417). TRL averages the supervised term over tokens; pass `alpha / chosen_length` for that.
    """
    preference_term = dpo_loss(chosen_logp, rejected_logp, beta=beta, label_smoothing=label_smoothing)
    return preference_term - alpha * as_float32(chosen_logp)


def simpo_loss(
    chosen_logp: Float[Array, "..."],
    rejected_logp: Float[Array, "..."],
    chosen_length: ArrayLike,
    rejected_length: ArrayLike,
    *,
    beta: ArrayLike,
    margin: ArrayLike = 0.5,
) -> Float[Array, "..."]:
    """-log s(beta (chosen average - rejected average) - margin) of average log-probabilities per action.

    Args:
      chosen_length, rejected_length: numbers of actions.
      beta: scale of the difference inside the sigmoid, > 0.
      margin: target margin of the chosen completion, the paper's gamma.

    Source: SimPO (arXiv 2405.14734, eq. 6).
    """
    chosen, rejected = _averages(chosen_logp, rejected_logp, chosen_length, rejected_length)
    check_positive("beta", beta)
    return -jax.nn.log_sigmoid(beta * (chosen - rejected) - margin)


def orpo_loss(
    chosen_logp: Float[Array, "..."],
    rejected_logp: Float[Array, "..."],
    chosen_length: ArrayLike,
    rejected_length: ArrayLike,
    *,
    beta: ArrayLike,
) -> Float[Array, "..."]:
    """Average negative log-likelihood of the chosen completion, minus beta log s(log odds ratio).

    The odds are p / (1 - p) with p = exp(average log-probability per action); the average is clipped to -1e-6. The
    likelihood term covers the completion only; TRL's includes the prompt.

    Args:
      beta: weight of the odds-ratio term, the paper's lambda, > 0.

    Source: ORPO (arXiv 2403.07691).
    """
    averages = _averages(chosen_logp, rejected_logp, chosen_length, rejected_length)
    check_positive("beta", beta)
    chosen, rejected = (jnp.minimum(average, _MAX_AVERAGE_LOGP) for average in averages)
    log_odds = (chosen - _log_complement(chosen)) - (rejected - _log_complement(rejected))
    return -averages[0] - beta * jax.nn.log_sigmoid(log_odds)


def _log_complement(logp: Array) -> Array:
    """log(1 - exp(logp)) for logp < 0, accurate for logp near 0 and for large negative logp."""
    near_zero = jnp.log(-jnp.expm1(jnp.maximum(logp, -0.7)))
    return jnp.where(logp > -0.7, near_zero, jnp.log1p(-jnp.exp(jnp.minimum(logp, -0.6))))


def _averages(chosen_logp, rejected_logp, chosen_length, rejected_length) -> tuple[Array, Array]:
    check_same_shape(chosen_logp=chosen_logp, rejected_logp=rejected_logp)
    return tuple(
        as_float32(logp) / jnp.maximum(length, 1)
        for logp, length in ((chosen_logp, chosen_length), (rejected_logp, rejected_length))
    )
