"""Bellman residuals on a token MDP with a known solution: fixed points, invariances and convergence."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from shiq_jax.objectives import bellman_residuals, squared_residuals, token_stats_from_logits

BETA = 0.7
HORIZONS = ("multi", "one", "trajectory")


@partial(jax.jit, static_argnames=("gamma", "horizon", "value", "gradient"))
def batched_residuals(logits, reference_logits, tokens, rewards, mask, **options):
    def sequence_residuals(policy, reference, rewards, mask):
        return bellman_residuals(policy, reference, rewards, mask, beta=BETA, **options)

    statistics = (token_stats_from_logits(x, tokens) for x in (logits, reference_logits))
    return jax.vmap(sequence_residuals)(*statistics, rewards, mask)


def residuals(tree, logits, rewards=None, **options):
    """Residuals [M, T] of all trajectories of a tree under logits [S, V]."""
    rewards = tree.along(tree.rewards if rewards is None else rewards)
    state_logits = (x[tree.states] for x in (logits, tree.logits.astype(logits.dtype)))
    return batched_residuals(*state_logits, tree.tokens, rewards, tree.mask, **options)


def lse(logits):
    return np.log(np.sum(np.exp(logits), -1))


def softmax(logits):
    return np.exp(logits - lse(logits)[..., None])


@pytest.mark.parametrize("dtype, atol", [("float32", 1e-5), ("float64", 1e-10)])
@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_optimum_is_a_fixed_point(make_tree, gamma, dtype, atol):
    with jax.enable_x64(dtype == "float64"):
        for seed in range(3):
            tree = make_tree(seed)
            q, v, pi = tree.solve(BETA, gamma)
            optimum = tree.logits + q / BETA
            np.testing.assert_allclose(softmax(optimum), pi, atol=1e-10)
            np.testing.assert_allclose(BETA * (lse(optimum) - lse(tree.logits)), v, atol=1e-10)
            for horizon in HORIZONS:
                actual = residuals(tree, optimum.astype(dtype), gamma=gamma, horizon=horizon)
                np.testing.assert_allclose(actual, 0, atol=atol)
            # Without the shift, the log-sum-exp of the optimal logits is the value itself.
            unshifted = optimum - lse(tree.logits)[:, None]
            for horizon in HORIZONS:
                actual = residuals(tree, unshifted.astype(dtype), gamma=gamma, horizon=horizon, value="lse")
                np.testing.assert_allclose(actual, 0, atol=atol)


def test_optimum_in_closed_form(make_tree):
    tree = make_tree(0)
    _, v, pi = tree.solve(BETA, 1.0)
    log_reference, returns, log_optimal = (
        tree.along(x).sum(1) for x in (np.log(softmax(tree.logits)), tree.rewards, np.log(pi))
    )
    constant = log_optimal - (log_reference + returns / BETA)
    np.testing.assert_allclose(constant, -v[0] / BETA, atol=1e-10)
    np.testing.assert_allclose(v[0], BETA * np.log(np.sum(np.exp(log_reference + returns / BETA))), atol=1e-10)
    assert len(constant) == 40 and len(v) == 13


def test_constant_rewards_change_the_policy_only_per_token(x64, make_tree):
    """A constant on the last token changes only the value; on every token it changes the policy, as lengths vary."""
    tree = make_tree(1)
    _, v, pi = tree.solve(BETA, 1.0)
    is_terminal = np.array([[tree.successor(s, a) is None for a in range(4)] for s in range(len(v))])
    q_end, v_end, pi_end = tree.solve(BETA, 1.0, tree.rewards + 2.0 * is_terminal)
    np.testing.assert_allclose(pi_end, pi, atol=1e-10)
    np.testing.assert_allclose(v_end, v + 2.0, atol=1e-10)
    actual = residuals(tree, tree.logits + q_end / BETA, tree.rewards + 2.0 * is_terminal)
    np.testing.assert_allclose(actual, 0, atol=1e-10)
    assert np.abs(tree.solve(BETA, 1.0, tree.rewards + 2.0)[2] - pi).max() > 1e-2


@pytest.mark.parametrize("horizon", HORIZONS)
@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_potential_shaping_keeps_policy_and_residuals(x64, make_tree, horizon, gamma):
    tree = make_tree(2)
    potential = np.random.default_rng(0).normal(size=len(tree.prefixes))
    shaped = tree.rewards.copy()
    for state in range(len(potential)):
        for token in range(4):
            next_state = tree.successor(state, token)
            shaped[state, token] += (0 if next_state is None else gamma * potential[next_state]) - potential[state]
    (_, v, pi), (_, v_shaped, pi_shaped) = tree.solve(BETA, gamma), tree.solve(BETA, gamma, shaped)
    np.testing.assert_allclose(pi_shaped, pi, atol=1e-10)
    np.testing.assert_allclose(v_shaped, v - potential, atol=1e-10)
    logits = np.random.default_rng(1).normal(size=tree.logits.shape)
    actual = residuals(tree, logits - potential[:, None] / BETA, shaped, gamma=gamma, horizon=horizon)
    np.testing.assert_allclose(actual, residuals(tree, logits, gamma=gamma, horizon=horizon), atol=1e-10)


def minimize(tree, steps, optimizer, **options):
    """Logits [steps, S, V] of gradient descent from the reference, on all trajectories with equal weight."""

    def loss(logits):
        actual = residuals(tree, logits, **options)
        return jnp.mean(jax.vmap(squared_residuals)(actual, tree.mask))

    def step(carry, _):
        logits, state = carry
        updates, state = optimizer.update(jax.grad(loss)(logits), state)
        logits = optax.apply_updates(logits, updates)
        return (logits, state), logits

    @jax.jit
    def run(logits):
        return jax.lax.scan(step, (logits, optimizer.init(logits)), None, steps)[1]

    return np.asarray(run(jnp.asarray(tree.logits)))


@pytest.mark.slow
@pytest.mark.parametrize("gamma", [1.0, 0.9])
@pytest.mark.parametrize(
    "horizon, value, gradient",
    [(h, v, "full") for h in HORIZONS for v in ("lse_shift", "lse")]
    + [("multi", "lse_shift", "semi"), ("one", "lse_shift", "semi")],
)
def test_training_converges_to_the_optimal_policy(x64, make_tree, horizon, value, gradient, gamma):
    tree = make_tree(3)
    _, v, pi = tree.solve(BETA, gamma)
    steps = 20_000
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, steps))
    actual = minimize(tree, steps, optimizer, horizon=horizon, value=value, gradient=gradient, gamma=gamma)[-1]
    np.testing.assert_allclose(softmax(actual), pi, atol=1e-8)
    values = BETA * (lse(actual) - (lse(tree.logits) if value == "lse_shift" else 0))
    np.testing.assert_allclose(values[0], v[0], atol=1e-8)
    if horizon != "trajectory":  # "trajectory" determines only the value of the first state
        np.testing.assert_allclose(values, v, atol=1e-8)


def test_multi_step_propagates_sparse_rewards_faster(x64, make_tree):
    """Compared after 100 and 300 steps, because the order is random early in training."""
    for seed in range(5):
        tree = make_tree(10 + seed, sparse=True)
        _, v, _ = tree.solve(BETA, 1.0)
        paths = (minimize(tree, 300, optax.sgd(0.5), horizon=horizon) for horizon in ("multi", "one"))
        multi, one = (np.abs(BETA * (lse(path) - lse(tree.logits))[:, 0] - v[0]) for path in paths)
        assert multi[100] < one[100] / 2
        assert multi[-1] < one[-1] / 10
