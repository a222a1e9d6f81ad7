"""Expected loss improvement of a private step, after arXiv 2402.18752, section 3.

Consider a step -eta (c G + noise) on a loss with gradient G and Hessian H. The batch has B units whose gradients have
covariance Sigma and are scaled by c on average; the noise has standard deviation sigma R in every coordinate of the
sum. The expected improvement is

    eta c |G|^2 - eta^2 c^2 / 2 (G'HG + tr(H Sigma) / B + D),    D = (sigma R / c)^2 tr(H) / B^2.

D is the decelerator: the part of the curvature term that is due to noise. All terms can be estimated on public data.
With a preconditioner P the step is -eta P (c G + noise); then G'PG replaces |G|^2 and PHP replaces H.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

Loss = Callable[[Any, Any], Float[Array, ""]]


class Landscape(NamedTuple):
    """Local geometry of a loss.

    Attributes:
        gradient: |G|^2.
        curvature: G'HG.
        trace: tr(H), by Hutchinson's estimator.
        sampling: tr(H Sigma), Sigma being the covariance of per-unit gradients.
    """

    gradient: Float[Array, ""]
    curvature: Float[Array, ""]
    trace: Float[Array, ""]
    sampling: Float[Array, ""]


class Improvement(NamedTuple):
    """Expected improvement of a step with the optimal learning rate, see `improvement`.

    Attributes:
        decelerator: D.
        private, plain: expected improvement with noise and without.
        slowdown: plain / private = 1 + D / (G'HG + tr(H Sigma) / B).
        learning_rate: eta c of the private step.
        best_batch: batch size with the largest improvement per unit at this noise multiplier.
        critical_batch: batch size at which the improvement is half of its limit for large batches.
    """

    decelerator: Float[Array, ""]
    private: Float[Array, ""]
    plain: Float[Array, ""]
    slowdown: Float[Array, ""]
    learning_rate: Float[Array, ""]
    best_batch: Float[Array, ""]
    critical_batch: Float[Array, ""]


def landscape(
    loss: Loss, params: Any, batches: Any, key: Array, *, units: int, probes: int = 16, preconditioner: Any = None
) -> Landscape:
    """Estimate the local geometry of a loss with Hessian-vector products; stores one gradient per batch.

    Args:
        loss: (params, batch) -> mean over the units of a batch; must be twice differentiable in reverse mode.
        params: pytree of floats.
        batches: pytree of arrays with a leading axis of two or more batches of public data; the loss is their mean.
        key: jax key of the probes.
        units: number of units per batch.
        probes: number of Rademacher vectors of Hutchinson's estimator. The standard error of the trace is at most
            sqrt(2 / probes) |H|_F, which is small relative to tr(H) for large models.
        preconditioner: pytree like params, the diagonal of P; None for the identity.
    """
    num_batches = len(jax.tree.leaves(batches)[0])
    if num_batches < 2:
        raise ValueError(f"the gradient covariance needs at least two batches, not {num_batches}")
    scale = optax.tree.ones_like(params) if preconditioner is None else preconditioner

    def mean_loss(params):
        return jnp.mean(jax.lax.map(lambda batch: loss(params, batch), batches))

    def quadratic_form(vector) -> Float[Array, ""]:
        """(P v)' H (P v)."""
        vector = jax.tree.map(jnp.multiply, scale, vector)
        product = jax.grad(lambda params: optax.tree.vdot(jax.grad(mean_loss)(params), vector))(params)
        return optax.tree.vdot(vector, product)

    gradients = jax.lax.map(lambda batch: jax.grad(loss)(params, batch), batches)
    mean = jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), gradients)
    deviations = jax.lax.map(quadratic_form, jax.tree.map(jnp.subtract, gradients, mean))
    traces = jax.lax.map(lambda key: quadratic_form(_rademacher(key, params)), jax.random.split(key, probes))
    return Landscape(
        gradient=optax.tree.vdot(mean, jax.tree.map(jnp.multiply, scale, mean)),
        curvature=quadratic_form(mean),
        trace=jnp.mean(traces),
        # Bessel's correction; the covariance of a batch gradient is that of a unit's divided by `units`.
        sampling=units * jnp.sum(deviations) / (num_batches - 1),
    )


def improvement(
    geometry: Landscape, batch_size: float, noise_stddev: float, clip_factor: Float[Array, ""] | float = 1.0
) -> Improvement:
    """Compute the expected improvement of a step with noise and without, each with its optimal learning rate.

    A curvature below 0, for which no learning rate is optimal, is replaced by the smallest positive number; a negative
    trace by 0.

    Args:
        geometry: local geometry of the loss.
        batch_size: B, units per step.
        noise_stddev: sigma R, see `Mechanism.noise_stddev`.
        clip_factor: c, the mean factor by which the clip rule scales gradients.
    """
    tiny = jnp.finfo(jnp.float32).tiny
    curvature, trace = jnp.maximum(geometry.curvature, tiny), jnp.maximum(geometry.trace, 0)
    sampling = jnp.maximum(geometry.sampling, 0)
    noise_curvature = jnp.square(noise_stddev / clip_factor) * trace
    decelerator, plain_curvature = noise_curvature / batch_size**2, curvature + sampling / batch_size
    numerator = 0.5 * jnp.square(geometry.gradient)
    critical = sampling + jnp.sqrt(jnp.square(sampling) + 4 * curvature * noise_curvature)
    return Improvement(
        decelerator=decelerator,
        private=numerator / (plain_curvature + decelerator),
        plain=numerator / plain_curvature,
        slowdown=1 + decelerator / plain_curvature,
        learning_rate=geometry.gradient / (plain_curvature + decelerator),
        best_batch=jnp.sqrt(noise_curvature / curvature),
        critical_batch=critical / (2 * curvature),
    )


def adam_preconditioner(state: optax.ScaleByAdamState, b2: float, eps: float = 1e-8) -> Any:
    """The diagonal by which Adam multiplies its first moment: 1 / (sqrt(v) + eps), v being bias-corrected."""
    bias_correction = 1 - b2 ** jnp.maximum(state.count, 1)
    return jax.tree.map(lambda leaf: 1 / (jnp.sqrt(leaf / bias_correction) + eps), state.nu)


def _rademacher(key: Array, params: Any) -> Any:
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    return jax.tree.unflatten(
        structure, [jax.random.rademacher(key, leaf.shape, leaf.dtype) for key, leaf in zip(keys, leaves)]
    )
