"""Regressions of whole sequences on reward: where reward less beta KL is largest, R - beta lr = V for all answers.

`lr` is the log-ratio to the reference and `R` the reward, both summed over the actions of one answer; `V` depends on
the prompt alone, and the methods differ in what stands for it. All answers, rewards and masks of one prompt are passed
as arrays of one shape; the last axis runs over the answers. All compute in fp32 (fp64 for fp64), and raise ValueError
while tracing for shapes that disagree and Python numbers out of range.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float

from shiq_jax.objectives.validation import as_mask, check_positive, masked, same_shape


def vargrad_loss(
    logratios: Float[Array, "... K"], returns: Float[Array, "... K"], real: Bool[Array, "... K"], *, beta: ArrayLike
) -> Float[Array, "... K"]:
    """(ln Z + lr - R / beta)^2 of each answer, ln Z the mean of R / beta - lr over the answers, without gradient.

    Args:
      logratios, returns: of the answers to one prompt, in nats and units of reward.
      real: which of them there are; the others get 0 and may hold anything.
      beta: temperature of the KL regularisation, in units of reward per nat.

    Source: VarGrad (arXiv 2010.10436), Trajectory Balance with Asynchrony (2503.18929).
    """
    gaps, mask = _gaps(logratios, returns, real, beta)
    return _squares(gaps - jax.lax.stop_gradient(_mean(gaps, mask)), mask)


def group_mean_loss(
    logratios: Float[Array, "... K"], returns: Float[Array, "... K"], real: Bool[Array, "... K"], *, beta: ArrayLike
) -> Float[Array, "... K"]:
    """(lr - (R - mean R) / beta)^2 of each answer: the mean reward stands for V.

    It adds the square of the mean log-ratio to `vargrad_loss`, a penalty on drift. Args as there.

    Source: Kimi k1.5 (arXiv 2501.12599, section 2.3).
    """
    gaps, mask = _gaps(logratios, returns, real, beta)
    return _squares(gaps + _mean(masked(returns, mask), mask) / beta, mask)


def a_star_po_loss(
    logratios: Float[Array, "... K"],
    returns: Float[Array, "... K"],
    real: Bool[Array, "... K"],
    *,
    beta: ArrayLike,
    value_beta: ArrayLike = 0.5,
) -> Float[Array, "... K"]:
    """(beta lr + V - R)^2 of each answer, V = value_beta ln mean exp(R / value_beta) over the reference's answers.

    The answers must be samples of the reference. Others as in `vargrad_loss`.

    Args:
      value_beta: temperature of V, the prompt's value, > 0.

    Source: A*-PO (arXiv 2505.20686).
    """
    gaps, mask = _gaps(logratios, returns, real, beta)
    check_positive("value_beta", value_beta)
    scaled = jnp.where(mask, masked(returns, mask) / value_beta, -jnp.inf)
    mean = jax.nn.logsumexp(scaled, axis=-1, keepdims=True) - jnp.log(jnp.sum(mask, axis=-1, keepdims=True))
    return _squares(beta * gaps + jax.lax.stop_gradient(value_beta * mean), mask)


def copg_loss(
    chosen_logratio: Float[Array, "..."],
    rejected_logratio: Float[Array, "..."],
    chosen_return: Float[Array, "..."],
    rejected_return: Float[Array, "..."],
    *,
    beta: ArrayLike,
) -> Float[Array, "..."]:
    """-d (lr - lr') of two answers to one prompt, with d = (R - beta lr / 2) - (R' - beta lr' / 2).

    All of it is differentiated. Its gradient is that of (1 / 2 beta) times the square of the pair's residual,
    (R - beta lr) - (R' - beta lr'): V is the same for both and cancels.

    Source: contrastive policy gradient (arXiv 2406.19185).
    """
    contrast, gain = _contrast(chosen_logratio, rejected_logratio, chosen_return, rejected_return, beta)
    return -(gain - beta * contrast / 2) * contrast


def rebel_loss(
    chosen_logratio: Float[Array, "..."],
    rejected_logratio: Float[Array, "..."],
    chosen_return: Float[Array, "..."],
    rejected_return: Float[Array, "..."],
    *,
    beta: ArrayLike,
) -> Float[Array, "..."]:
    """(beta (lr - lr') - (R - R'))^2 of two answers to one prompt; beta is the paper's 1 / eta.

    Source: REBEL (arXiv 2404.16767); its reference is the policy that the iteration began with.
    """
    contrast, gain = _contrast(chosen_logratio, rejected_logratio, chosen_return, rejected_return, beta)
    return (beta * contrast - gain) ** 2


def _gaps(logratios, returns, real, beta) -> tuple[Array, Array]:
    """lr - R / beta, 0 where nothing is real, and the mask."""
    same_shape(logratios=logratios, returns=returns)
    same_shape(logratios=logratios, real=real)
    check_positive("beta", beta)
    mask = as_mask(real)
    return masked(logratios, mask) - masked(returns, mask) / beta, mask


def _mean(values, mask) -> Array:
    return jnp.sum(values, axis=-1, keepdims=True) / jnp.maximum(jnp.sum(mask, axis=-1, keepdims=True), 1)


def _squares(values, mask) -> Array:
    return jnp.where(mask, values, 0) ** 2


def _contrast(chosen_logratio, rejected_logratio, chosen_return, rejected_return, beta) -> tuple[Array, Array]:
    same_shape(chosen_logratio=chosen_logratio, rejected_logratio=rejected_logratio)
    same_shape(chosen_return=chosen_return, rejected_return=rejected_return)
    check_positive("beta", beta)
    everywhere = jnp.ones(jnp.shape(chosen_logratio), bool)
    chosen, rejected = masked(chosen_logratio, everywhere), masked(rejected_logratio, everywhere)
    return chosen - rejected, masked(chosen_return, everywhere) - masked(rejected_return, everywhere)
