"""What a step gains, against losses whose Hessian is known, and steps that were taken."""

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
DRAWN = RNG.normal(size=(SIZE, SIZE))
HESSIAN = jnp.asarray(DRAWN @ DRAWN.T / SIZE + 0.1 * np.eye(SIZE), jnp.float32)
SPREAD = np.linspace(0.2, 1.5, SIZE)


def quadratic(params, batch):
    """The mean over units of p'Hp / 2 - p'x: the gradient of a unit is Hp - x."""
    p = jnp.concatenate([params["a"], params["b"]])
    return 0.5 * p @ HESSIAN @ p - jnp.mean(batch @ p)


@pytest.fixture(scope="module")
def point():
    return {"a": jnp.asarray(RNG.normal(size=5), jnp.float32), "b": jnp.asarray(RNG.normal(size=7), jnp.float32)}


@pytest.fixture(scope="module")
def batches():
    return jnp.asarray(SPREAD * RNG.normal(size=(BATCHES, UNITS, SIZE)), jnp.float32)


@pytest.mark.parametrize("preconditioned", [False, True])
def test_a_quadratic_where_all_is_known(preconditioned, point, batches):
    scale = np.linspace(0.5, 2, SIZE) if preconditioned else np.ones(SIZE)
    given = {"a": jnp.asarray(scale[:5], jnp.float32), "b": jnp.asarray(scale[5:], jnp.float32)}
    found = landscape(
        quadratic, point, batches, jax.random.key(0), units=UNITS, probes=4000,
        preconditioner=given if preconditioned else None,
    )  # fmt: skip
    p = np.concatenate([point["a"], point["b"]])
    gradient = HESSIAN @ p - np.mean(batches, axis=(0, 1))
    bent = scale[:, None] * np.asarray(HESSIAN) * scale
    np.testing.assert_allclose(found.gradient, gradient @ (scale * gradient), rtol=1e-4)
    np.testing.assert_allclose(found.curvature, gradient @ bent @ gradient, rtol=1e-4)
    np.testing.assert_allclose(found.trace, np.trace(bent), rtol=0.03)
    # Against the covariance that the units were drawn with.
    np.testing.assert_allclose(found.sampling, np.sum(np.diag(bent) * SPREAD**2), rtol=0.25)
    covariance = UNITS * np.cov(np.mean(batches, axis=1).T)
    np.testing.assert_allclose(found.sampling, np.sum(bent * covariance), rtol=1e-3)


@pytest.mark.slow
def test_a_decoder_against_its_whole_hessian(decoder, batch_of, example_losses):
    """Through the model's own backward passes, which are differentiated once more."""
    model, params = decoder("biases")
    params = jax.tree.map(lambda leaf: jnp.asarray(0.5 * leaf), params)
    learned, rest = partition(params, lambda path: path[-2:] in (("query", "bias"), ("mlp_norm", "scale")))
    losses, batch = example_losses(model, "trajectory"), batch_of("trajectory")
    halves = jax.tree.map(lambda leaf: jnp.asarray(leaf)[:16].reshape(2, 8, *leaf.shape[1:]), batch)

    def loss(learned, batch):
        return jnp.mean(losses(merge(learned, rest), batch, None))

    found = landscape(loss, learned, halves, jax.random.key(0), units=8, probes=64)
    flat, restore = ravel_pytree(learned)

    @jax.jit
    def gradient(flat):
        return ravel_pytree(
            jax.tree.map(lambda *leaves: sum(leaves) / 2, *(
                jax.grad(loss)(restore(flat), jax.tree.map(lambda leaf: leaf[half], halves)) for half in (0, 1)
            ))
        )[0]  # fmt: skip

    mine = gradient(flat)
    step = 1e-3
    # By central differences: forward mode does not go through the model's products.
    bent = gradient(flat + step * mine / jnp.linalg.norm(mine)) - gradient(flat - step * mine / jnp.linalg.norm(mine))
    expected = float(mine @ bent) * float(jnp.linalg.norm(mine)) / (2 * step)
    np.testing.assert_allclose(found.gradient, mine @ mine, rtol=1e-4)
    np.testing.assert_allclose(found.curvature, expected, rtol=0.02)
    columns = jax.lax.map(
        lambda at: (gradient(flat.at[at].add(step))[at] - gradient(flat.at[at].add(-step))[at]) / (2 * step),
        jnp.arange(len(flat)),
    )
    assert abs(float(found.trace) - float(columns.sum())) < 0.3 * float(jnp.abs(columns).sum())


def test_the_gain_is_that_of_the_best_step(point, batches):
    """Steps on the quadratic with clipped units and noise, averaged, at the rate that is said to be best and beside."""
    batch, noise, clipped = 16, 3.0, 0.5
    covariance, hessian = np.diag(SPREAD**2), np.asarray(HESSIAN, np.float64)
    p = np.asarray(np.concatenate([point["a"], point["b"]]), np.float64)
    gradient = hessian @ p
    known = Landscape(
        gradient=gradient @ gradient, curvature=gradient @ hessian @ gradient, trace=np.trace(hessian),
        sampling=np.sum(hessian * covariance),
    )  # fmt: skip
    found = jax.tree.map(float, improvement(known, batch, noise, clipped))
    rng, draws = np.random.default_rng(1), 200_000
    drawn = gradient + rng.normal(size=(draws, SIZE)) * SPREAD / np.sqrt(batch)
    moved = clipped * drawn + noise * rng.normal(size=drawn.shape) / batch

    def gained(rate, moved) -> float:
        step = rate * moved
        return float(np.mean(step @ gradient - 0.5 * np.einsum("ni,ij,nj->n", step, hessian, step)))

    rate = found.learning_rate / clipped
    np.testing.assert_allclose(gained(rate, moved), found.private, rtol=0.02)
    assert gained(0.8 * rate, moved) < gained(rate, moved) and gained(1.2 * rate, moved) < gained(rate, moved)
    plain = known.gradient / (known.curvature + known.sampling / batch)
    np.testing.assert_allclose(gained(plain, drawn), found.plain, rtol=0.02)
    np.testing.assert_allclose(found.slowdown, found.plain / found.private, rtol=1e-5)
    np.testing.assert_allclose(found.decelerator, (noise / clipped) ** 2 * np.trace(hessian) / batch**2, rtol=1e-5)


def test_the_best_batch_gains_most_per_unit_and_the_critical_one_half_of_all():
    known = Landscape(*map(jnp.float32, (2.0, 0.7, 5.0, 30.0)))
    per_unit = {batch: float(improvement(known, batch, 4.0, 0.3).private) / batch for batch in range(1, 400)}
    found = improvement(known, 1, 4.0, 0.3)
    assert abs(max(per_unit, key=per_unit.get) - float(found.best_batch)) <= 1
    most = float(improvement(known, 1e7, 4.0, 0.3).private)
    half = float(improvement(known, float(found.critical_batch), 4.0, 0.3).private)
    assert half == pytest.approx(most / 2, rel=1e-3)
    # Without noise a larger batch never gains more per unit.
    silent = [float(improvement(known, batch, 0.0).private) / batch for batch in (1, 2, 4, 8)]
    assert silent == sorted(silent, reverse=True) and float(improvement(known, 4, 0.0).slowdown) == 1


def test_one_batch_has_no_variance(point, batches):
    with pytest.raises(ValueError, match="two batches at least"):
        landscape(quadratic, point, batches[:1], jax.random.key(0), units=UNITS)


def test_the_preconditioner_is_what_adam_multiplies_by(point):
    """With no momentum the update is -rate * P g, whatever came before."""
    rule = optax.chain(optax.clip_by_global_norm(1e9), optax.adamw(1.0, b1=0.0, b2=0.9))
    state = rule.init(point)
    for number in range(3):
        grads = jax.tree.map(lambda leaf: jnp.cos(leaf + number), point)
        updates, state = rule.update(grads, state, jax.tree.map(jnp.zeros_like, point))
    scale = adam_preconditioner(adam_state(state), 0.9)
    jax.tree.map(lambda u, s, g: np.testing.assert_allclose(u, -s * g, rtol=1e-4), updates, scale, grads)
