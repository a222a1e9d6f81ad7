"""How much a private step can improve a loss, and what takes the rest: arXiv 2402.18752, section 3.

A step -eta (c G + noise) on a loss with gradient G and Hessian H, of B units whose gradients have the covariance Sigma
and are scaled by c on average, with noise of standard deviation sigma R in every coordinate of their sum, improves it
by

    eta c |G|^2 - eta^2 c^2 / 2 (G'HG + tr(H Sigma) / B + D),    D = (sigma R / c)^2 tr(H) / B^2,

D being the decelerator: what privacy adds to the curvature that a step meets. All of it is to be had from public data
alone. With a preconditioner P the step is -eta P (c G + noise), and |G|^2 stands for G'PG and H for PHP everywhere.
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
    """A loss around a point.

    Attributes:
        gradient: |G|^2.
        curvature: G'HG.
        trace: tr(H), by Hutchinson's estimator.
        sampling: tr(H Sigma), Sigma the covariance of the gradients of single units.
    """

    gradient: Float[Array, ""]
    curvature: Float[Array, ""]
    trace: Float[Array, ""]
    sampling: Float[Array, ""]


class Improvement(NamedTuple):
    """What `Landscape` says of steps with the best learning rate, see `improvement`.

    Attributes:
        decelerator: D.
        private, plain: the expected improvement of a step with noise and without.
        slowdown: plain / private = 1 + D / (G'HG + tr(H Sigma) / B).
        learning_rate: eta c, of the private step.
        best_batch: the batch whose improvement per unit is largest at this noise multiplier.
        critical_batch: the batch from which a larger one gains less than half of what the largest would.
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
    """Gradient, curvature and trace of a loss, by products with its Hessian; one gradient is held for each batch.

    Args:
        loss: (params, batch) -> mean over the units of a batch, twice differentiable in reverse mode.
        params: pytree of floats.
        batches: pytree of arrays with a leading axis of at least two batches of public data; their mean is the loss.
        key: jax key of the probes.
        units: of a batch.
        probes: Rademacher vectors of Hutchinson's estimator, whose relative error is sqrt(2 / probes) tr(H^2)^1/2 /
            tr(H) for a diagonal that varies little, and less for large models.
        preconditioner: pytree like params, the diagonal of P; None for 1.
    """
    count = len(jax.tree.leaves(batches)[0])
    if count < 2:
        raise ValueError("the variance of gradients needs two batches at least")
    scale = optax.tree.ones_like(params) if preconditioner is None else preconditioner

    def whole(params):
        return jnp.mean(jax.lax.map(lambda batch: loss(params, batch), batches))

    def bent(vector) -> Float[Array, ""]:
        """(P v)' H (P v)."""
        vector = jax.tree.map(jnp.multiply, scale, vector)
        product = jax.grad(lambda params: optax.tree.vdot(jax.grad(whole)(params), vector))(params)
        return optax.tree.vdot(vector, product)

    gradients = jax.lax.map(lambda batch: jax.grad(loss)(params, batch), batches)
    mean = jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), gradients)
    spread = jax.lax.map(bent, jax.tree.map(jnp.subtract, gradients, mean))
    probed = jax.lax.map(lambda key: bent(_rademacher(key, params)), jax.random.split(key, probes))
    return Landscape(
        gradient=optax.tree.vdot(mean, jax.tree.map(jnp.multiply, scale, mean)),
        curvature=bent(mean),
        trace=jnp.mean(probed),
        # The deviations from a mean of `count` are too small by 1 / count; a batch's are those of a unit over B.
        sampling=units * jnp.sum(spread) / (count - 1),
    )


def improvement(found: Landscape, batch: float, noise: float, clipped: Float[Array, ""] | float = 1.0) -> Improvement:
    """What a step on so many units gains, and how much of it privacy leaves.

    Curvatures below 0, which a step would follow without end, are taken for next to none; so are traces.

    Args:
        found: of the loss.
        batch: B, units of a step.
        noise: sigma R, `Mechanism.noise_stddev`.
        clipped: c, the mean factor by which gradients are scaled.
    """
    tiny = jnp.finfo(jnp.float32).tiny
    curvature, trace = jnp.maximum(found.curvature, tiny), jnp.maximum(found.trace, 0)
    sampling = jnp.maximum(found.sampling, 0)
    spread = jnp.square(noise / clipped) * trace
    decelerator, met = spread / batch**2, curvature + sampling / batch
    gained = 0.5 * jnp.square(found.gradient)
    return Improvement(
        decelerator=decelerator,
        private=gained / (met + decelerator),
        plain=gained / met,
        slowdown=1 + decelerator / met,
        learning_rate=found.gradient / (met + decelerator),
        best_batch=jnp.sqrt(spread / curvature),
        critical_batch=(sampling + jnp.sqrt(jnp.square(sampling) + 4 * curvature * spread)) / (2 * curvature),
    )


def adam_preconditioner(memory: optax.ScaleByAdamState, b2: float, eps: float = 1e-8) -> Any:
    """The diagonal by which Adam multiplies its mean gradient: 1 / (sqrt(v) + eps), v corrected for its beginning."""
    corrected = 1 - b2 ** jnp.maximum(memory.count, 1)
    return jax.tree.map(lambda leaf: 1 / (jnp.sqrt(leaf / corrected) + eps), memory.nu)


def _rademacher(key: Array, params: Any) -> Any:
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    return jax.tree.unflatten(
        structure, [jax.random.rademacher(each, leaf.shape, leaf.dtype) for each, leaf in zip(keys, leaves)]
    )
