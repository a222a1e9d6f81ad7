"""Schedules, clipping, weight decay, and convergence of every optimizer on a quadratic."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from shiq_jax.training.optimizers import Optimizer, clip_by_global_norm

NAMES = ("adamw", "lion", "adafactor", "sgd")


def test_linear_schedule_with_warmup():
    rate = Optimizer(learning_rate=2.0, schedule="linear", warmup=0.1, final=0.25).learning_rate_at(100)
    np.testing.assert_allclose(rate(10), 2.0, rtol=1e-6)
    np.testing.assert_allclose(rate(55), 1.25, rtol=1e-6)
    np.testing.assert_allclose(rate(100), 0.5, rtol=1e-6)
    warmup = [float(rate(step)) for step in range(11)]
    np.testing.assert_allclose(np.diff(warmup), 2.0 / 11, rtol=1e-5)


def test_cosine_schedule():
    rate = Optimizer(learning_rate=1.0, schedule="cosine", warmup=0.0, final=0.2).learning_rate_at(40)
    np.testing.assert_allclose([rate(0), rate(20), rate(40)], [1.0, 0.6, 0.2], rtol=1e-6)
    np.testing.assert_allclose(rate(10), 0.2 + 0.8 * (1 + np.cos(np.pi / 4)) / 2, rtol=1e-6)


def test_constant_schedule_with_warmup():
    rate = Optimizer(learning_rate=3.0, schedule="constant", warmup=0.5).learning_rate_at(10)
    np.testing.assert_allclose([rate(step) for step in (5, 6, 9)], 3.0, rtol=1e-6)
    assert rate(4) < 3.0


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("steps", [1, 2, 7, 30])
def test_learning_rate_is_positive_and_reaches_but_never_exceeds_the_peak(schedule, steps):
    rate = Optimizer(learning_rate=1.0, schedule=schedule, warmup=0.3).learning_rate_at(steps)
    rates = np.array([float(rate(step)) for step in range(steps)])
    assert (rates > 0).all() and (rates <= 1 + 1e-6).all() and np.isclose(rates.max(), 1)


def test_only_gradients_above_the_clip_norm_are_scaled():
    optimizer = Optimizer("sgd", learning_rate=1.0, schedule="constant", warmup=0, clip_norm=0.5, b1=0).build(10)
    params = {"a": jnp.zeros(3), "b": jnp.zeros(2)}
    state = optimizer.init(params)
    large = {"a": jnp.array([3.0, 0, 0]), "b": jnp.array([0, 4.0])}
    updates, _ = optimizer.update(large, state, params)
    np.testing.assert_allclose(optax.tree.norm(updates), 0.5, rtol=1e-6)
    np.testing.assert_allclose(updates["b"][1] / updates["a"][0], 4 / 3, rtol=1e-6)
    small = jax.tree.map(lambda leaf: leaf / 20, large)
    updates, _ = optimizer.update(small, state, params)
    np.testing.assert_allclose(updates["b"][1], -0.2, rtol=1e-6)


def test_clip_norm_zero_disables_clipping():
    optimizer = Optimizer("sgd", learning_rate=1.0, schedule="constant", warmup=0, clip_norm=0, b1=0).build(10)
    updates, _ = optimizer.update({"a": jnp.array([1e6])}, optimizer.init({"a": jnp.zeros(1)}), {"a": jnp.zeros(1)})
    np.testing.assert_allclose(updates["a"], -1e6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_every_optimizer_minimizes_a_quadratic(name, schedule):
    optimizer = Optimizer(name, learning_rate=0.05, schedule=schedule, clip_norm=10.0).build(60)
    scales = jnp.array([1.0, 2.0, 4.0])

    def loss(params):
        return jnp.sum(scales * (params["x"] - 1) ** 2)

    def step(carry, _):
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    params = {"x": jnp.array([3.0, -2.0, 0.5])}
    (last, _), _ = jax.jit(lambda carry: jax.lax.scan(step, carry, None, 60))((params, optimizer.init(params)))
    assert loss(last) < 0.5 * loss(params)


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor"])
def test_weight_decay_follows_the_learning_rate(name):
    """With a zero gradient the update is the decoupled weight decay alone."""
    settings = Optimizer(name, learning_rate=0.1, schedule="linear", warmup=0, weight_decay=0.2)
    optimizer, params = settings.build(4), {"x": jnp.array([2.0, -1.0])}
    state = optimizer.init(params)
    for step in range(3):
        updates, state = optimizer.update(jax.tree.map(jnp.zeros_like, params), state, params)
        np.testing.assert_allclose(updates["x"], -settings.learning_rate_at(4)(step) * 0.2 * params["x"], rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_zero_learning_rate_gives_zero_updates(name):
    optimizer, params = Optimizer(name, learning_rate=0.0, weight_decay=0.3).build(5), {"x": jnp.array([2.0, -1.0])}
    updates, _ = optimizer.update({"x": jnp.ones(2)}, optimizer.init(params), params)
    np.testing.assert_array_equal(updates["x"], 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": -1e-5}, "learning_rate must be at least 0 and finite, not -1e-05"),
        ({"learning_rate": float("nan")}, "learning_rate must be at least 0 and finite, not nan"),
        ({"warmup": 1.0}, r"must lie in \[0, 1\), not 1.0"),
    ],
)
def test_invalid_settings_are_rejected(options, message):
    with pytest.raises(ValueError, match=message):
        Optimizer(**options)


@pytest.mark.parametrize("norm", [0.0, 1e-3, 0.99, 1.0, 1.01, 50.0])
def test_clipping_matches_optax(norm):
    leaves = {"a": jax.random.normal(jax.random.key(0), (3, 4)), "b": jax.random.normal(jax.random.key(1), (5,))}
    gradient = jax.tree.map(lambda leaf: leaf * norm / optax.tree.norm(leaves), leaves)
    actual, expected = (
        transformation.update(gradient, transformation.init(leaves))[0]
        for transformation in (clip_by_global_norm(1.0), optax.clip_by_global_norm(1.0))
    )
    chex.assert_trees_all_close(actual, expected, rtol=1e-6)
