"""Loss-improvement estimates against losses with a known Hessian and against simulated steps."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from shiq_jax.privacy import adam_preconditioner, adam_state, improvement, landscape
from shiq_jax.privacy.loss_improvement import Landscape
from shiq_jax.training.state import merge, partition

SIZE, BATCHES, UNITS = 12, 64, 16
RNG = np.random.default_rng(0)
FACTOR = RNG.normal(size=(SIZE, SIZE))
HESSIAN = jnp.asarray(FACTOR @ FACTOR.T / SIZE + 0.1 * np.eye(SIZE), jnp.float32)
# Standard deviation of the units in each coordinate.
STDDEV = np.linspace(0.2, 1.5, SIZE)


def quadratic(params, batch):
    """Mean over units x of p'Hp / 2 - p'x, where the gradient of a unit is Hp - x."""
    p = jnp.concatenate([params["a"], params["b"]])
    return 0.5 * p @ HESSIAN @ p - jnp.mean(batch @ p)


@pytest.fixture(scope="module")
def params():
    return {"a": jnp.asarray(RNG.normal(size=5), jnp.float32), "b": jnp.asarray(RNG.normal(size=7), jnp.float32)}


@pytest.fixture(scope="module")
def batches():
    return jnp.asarray(STDDEV * RNG.normal(size=(BATCHES, UNITS, SIZE)), jnp.float32)


@pytest.mark.parametrize("preconditioned", [False, True])
def test_landscape_of_a_quadratic(preconditioned, params, batches):
    scale = np.linspace(0.5, 2, SIZE) if preconditioned else np.ones(SIZE)
    preconditioner = {"a": jnp.asarray(scale[:5], jnp.float32), "b": jnp.asarray(scale[5:], jnp.float32)}
    geometry = landscape(
        quadratic, params, batches, jax.random.key(0), units=UNITS, probes=4000,
        preconditioner=preconditioner if preconditioned else None,
    )  # fmt: skip
    p = np.concatenate([params["a"], params["b"]])
    gradient = HESSIAN @ p - np.mean(batches, axis=(0, 1))
    hessian = scale[:, None] * np.asarray(HESSIAN) * scale
    np.testing.assert_allclose(geometry.gradient, gradient @ (scale * gradient), rtol=1e-4)
    np.testing.assert_allclose(geometry.curvature, gradient @ hessian @ gradient, rtol=1e-4)
    np.testing.assert_allclose(geometry.trace, np.trace(hessian), rtol=0.03)
    # Compare with the true covariance of the units, then with the covariance of this sample.
    np.testing.assert_allclose(geometry.sampling, np.sum(np.diag(hessian) * STDDEV**2), rtol=0.25)
    covariance = UNITS * np.cov(np.mean(batches, axis=1).T)
    np.testing.assert_allclose(geometry.sampling, np.sum(hessian * covariance), rtol=1e-3)


@pytest.mark.slow
def test_landscape_of_a_decoder(decoder, make_batch, unit_losses):
    """Against central differences; differentiates the model's custom backward passes a second time."""
    model, params = decoder("biases")
    params = jax.tree.map(lambda leaf: jnp.asarray(0.5 * leaf), params)
    trainable, frozen = partition(params, lambda path: path[-2:] in (("query", "bias"), ("mlp_norm", "scale")))
    losses, batch = unit_losses(model, "trajectory"), make_batch("trajectory")
    halves = jax.tree.map(lambda leaf: jnp.asarray(leaf)[:16].reshape(2, 8, *leaf.shape[1:]), batch)

    def loss(trainable, batch):
        return jnp.mean(losses(merge(trainable, frozen), batch, None))

    geometry = landscape(loss, trainable, halves, jax.random.key(0), units=8, probes=64)
    flat, unravel = ravel_pytree(trainable)

    @jax.jit
    def flat_gradient(flat):
        return ravel_pytree(
            jax.tree.map(lambda *leaves: sum(leaves) / 2, *(
                jax.grad(loss)(unravel(flat), jax.tree.map(lambda leaf: leaf[half], halves)) for half in (0, 1)
            ))
        )[0]  # fmt: skip

    gradient = flat_gradient(flat)
    norm, step = jnp.linalg.norm(gradient), 1e-3
    # Finite differences, because the custom VJPs of the model do not support forward mode.
    difference = flat_gradient(flat + step * gradient / norm) - flat_gradient(flat - step * gradient / norm)
    curvature = float(gradient @ difference) * float(norm) / (2 * step)
    np.testing.assert_allclose(geometry.gradient, gradient @ gradient, rtol=1e-4)
    np.testing.assert_allclose(geometry.curvature, curvature, rtol=0.02)
    diagonal = jax.lax.map(
        lambda i: (flat_gradient(flat.at[i].add(step))[i] - flat_gradient(flat.at[i].add(-step))[i]) / (2 * step),
        jnp.arange(len(flat)),
    )
    assert abs(float(geometry.trace) - float(diagonal.sum())) < 0.3 * float(jnp.abs(diagonal).sum())


def test_improvement_matches_simulated_steps(params):
    """Average noisy clipped steps on the quadratic, at the predicted best learning rate and at other ones."""
    batch_size, noise_stddev, clip_factor = 16, 3.0, 0.5
    covariance, hessian = np.diag(STDDEV**2), np.asarray(HESSIAN, np.float64)
    p = np.asarray(np.concatenate([params["a"], params["b"]]), np.float64)
    gradient = hessian @ p
    geometry = Landscape(
        gradient=gradient @ gradient, curvature=gradient @ hessian @ gradient, trace=np.trace(hessian),
        sampling=np.sum(hessian * covariance),
    )  # fmt: skip
    predicted = jax.tree.map(float, improvement(geometry, batch_size, noise_stddev, clip_factor))
    rng, samples = np.random.default_rng(1), 200_000
    plain = gradient + rng.normal(size=(samples, SIZE)) * STDDEV / np.sqrt(batch_size)
    private = clip_factor * plain + noise_stddev * rng.normal(size=plain.shape) / batch_size

    def mean_improvement(learning_rate, direction) -> float:
        step = learning_rate * direction
        return float(np.mean(step @ gradient - 0.5 * np.einsum("ni,ij,nj->n", step, hessian, step)))

    rate = predicted.learning_rate / clip_factor
    np.testing.assert_allclose(mean_improvement(rate, private), predicted.private, rtol=0.02)
    assert mean_improvement(0.8 * rate, private) < mean_improvement(rate, private)
    assert mean_improvement(1.2 * rate, private) < mean_improvement(rate, private)
    plain_rate = geometry.gradient / (geometry.curvature + geometry.sampling / batch_size)
    np.testing.assert_allclose(mean_improvement(plain_rate, plain), predicted.plain, rtol=0.02)
    np.testing.assert_allclose(predicted.slowdown, predicted.plain / predicted.private, rtol=1e-5)
    decelerator = (noise_stddev / clip_factor) ** 2 * np.trace(hessian) / batch_size**2
    np.testing.assert_allclose(predicted.decelerator, decelerator, rtol=1e-5)


def test_best_and_critical_batch_sizes():
    geometry = Landscape(*map(jnp.float32, (2.0, 0.7, 5.0, 30.0)))
    per_unit = {size: float(improvement(geometry, size, 4.0, 0.3).private) / size for size in range(1, 400)}
    result = improvement(geometry, 1, 4.0, 0.3)
    assert abs(max(per_unit, key=per_unit.get) - float(result.best_batch)) <= 1
    limit = float(improvement(geometry, 1e7, 4.0, 0.3).private)
    critical = float(improvement(geometry, float(result.critical_batch), 4.0, 0.3).private)
    assert critical == pytest.approx(limit / 2, rel=1e-3)
    # Without noise the improvement per unit falls with the batch size.
    noiseless = [float(improvement(geometry, size, 0.0).private) / size for size in (1, 2, 4, 8)]
    assert noiseless == sorted(noiseless, reverse=True)
    assert float(improvement(geometry, 4, 0.0).slowdown) == 1


def test_a_single_batch_is_rejected(params, batches):
    with pytest.raises(ValueError, match="at least two batches, not 1"):
        landscape(quadratic, params, batches[:1], jax.random.key(0), units=UNITS)


def test_preconditioner_matches_adam(params):
    """Without momentum Adam's update is -learning_rate * P g, for any history."""
    optimizer = optax.chain(optax.clip_by_global_norm(1e9), optax.adamw(1.0, b1=0.0, b2=0.9))
    state = optimizer.init(params)
    for step in range(3):
        grads = jax.tree.map(lambda leaf: jnp.cos(leaf + step), params)
        updates, state = optimizer.update(grads, state, jax.tree.map(jnp.zeros_like, params))
    scale = adam_preconditioner(adam_state(state), 0.9)
    chex.assert_trees_all_close(updates, jax.tree.map(lambda s, g: -s * g, scale, grads), rtol=1e-4)
