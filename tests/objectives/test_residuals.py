"""Bellman residuals and the ShiQ loss against hand-computed numbers, their definition and closed-form gradients."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shiq_jax.objectives import TokenStats, bellman_residuals, shiq_loss, squared_residuals, token_stats_from_logits

HORIZONS = ("multi", "one", "trajectory")

# Worked example with four positions and three tokens; the second position is not an action.
LOGITS = np.array([[1.0, 0, -1], [2, 2, 2], [0, 2, 1], [0.5, 0.5, 0]])
REFERENCE_LOGITS = np.array([[0.0, 0, 0], [1, 0, 3], [0, 1, 1], [0.5, -0.5, 0]])
TOKENS = np.array([0, 1, 1, 2])
MASK = np.array([True, False, True, True])
REWARDS = np.array([0, 9, 0.25, 1])
WORKED = [  # gamma, horizon, value, residuals at the actions, loss
    (1.0, "one", "lse_shift", (-0.227194, -0.111125, 1.0), 1.063966),
    (1.0, "one", "lse", (0.154497, -0.451987, 0.409865), 0.396151),
    (1.0, "multi", "lse_shift", (0.661681, 0.888875, 1.0), 2.227921),
    (1.0, "multi", "lse", (0.112375, -0.042122, 0.409865), 0.182392),
    (1.0, "trajectory", "lse_shift", (0.661681, 0, 0), 0.437821),
    (1.0, "trajectory", "lse", (0.112375, 0, 0), 0.012628),
    (0.9, "one", "lse_shift", (-0.254475, -0.125012, 1.0), 1.080386),
    (0.9, "one", "lse", (0.034117, -0.524888, 0.409865), 0.444661),
    (0.9, "multi", "lse_shift", (0.443014, 0.774988, 1.0), 1.796867),
    (0.9, "multi", "lse", (-0.106292, -0.156010, 0.409865), 0.203627),
    (0.9, "trajectory", "lse_shift", (0.443014, 0, 0), 0.196261),
    (0.9, "trajectory", "lse", (-0.106292, 0, 0), 0.011298),
]


stats_of = jax.jit(token_stats_from_logits)
residuals_of = jax.jit(bellman_residuals, static_argnames=("beta", "gamma", "horizon", "n", "value", "gradient"))
loss_of = jax.jit(shiq_loss, static_argnames=("beta", "gamma", "normalisation", "position_weight"))


def stats(logits, tokens=TOKENS) -> TokenStats:
    return stats_of(jnp.asarray(logits), jnp.asarray(tokens))


def worked(logits=LOGITS, **options):
    options = {"beta": 0.5} | options
    return residuals_of(stats(logits), stats(REFERENCE_LOGITS), REWARDS, MASK, **options)


def random_sequence(seed, length=7, vocabulary=5, actions=None):
    """Logits of policy and reference with an offset per state, tokens, rewards, and a mask with `actions` actions."""
    random = np.random.default_rng(seed)
    logits, reference = (random.normal(size=(length, vocabulary)) + 3 * random.normal(size=(length, 1)) for _ in "ab")
    mask = np.zeros(length, bool)
    count = int(random.integers(2, length + 1)) if actions is None else actions
    mask[random.choice(length, count, replace=False)] = True
    return logits, reference, random.integers(0, vocabulary, length), random.normal(size=length), mask


def by_definition(policy, reference, rewards, mask, *, beta, gamma, steps, shift, bootstrap):
    """Residuals by a double loop over the actions in numpy; steps=None means to the end."""
    actions = np.flatnonzero(mask)
    logp, lse, ref_logp, ref_lse = (np.asarray(array, float)[actions] for array in (*policy, *reference))
    x = rewards[actions] - beta * (logp - ref_logp)
    v = np.append(beta * (lse - (ref_lse if shift else 0)), bootstrap)
    residuals = np.zeros(len(mask))
    for t in range(len(actions)):
        end = len(actions) if steps is None else min(t + steps, len(actions))
        target = sum(gamma ** (k - t) * x[k] for k in range(t, end)) + gamma ** (end - t) * v[end]
        residuals[actions[t]] = target - v[t]
    return residuals


# --- hand-computed numbers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_worked_example(dtype):
    @jax.jit
    def table(logits, reference_logits):
        policy, reference = (token_stats_from_logits(x, TOKENS) for x in (logits, reference_logits))
        rows = []
        for gamma, horizon, value, *_ in WORKED:
            options = {"beta": 0.5, "gamma": gamma, "horizon": horizon, "value": value}
            residuals = bellman_residuals(policy, reference, REWARDS, MASK, **options)
            rows.append((residuals, squared_residuals(residuals, MASK)))
        return rows

    with jax.enable_x64(dtype == "float64"):
        actual = table(LOGITS.astype(dtype), REFERENCE_LOGITS.astype(dtype))
    for (*case, residuals, loss), (actual_residuals, actual_loss) in zip(WORKED, actual, strict=True):
        assert actual_residuals.dtype == dtype
        np.testing.assert_allclose(actual_residuals, np.insert(residuals, 1, 0), atol=2e-6, err_msg=str(case))
        np.testing.assert_allclose(actual_loss, loss, atol=2e-6, err_msg=str(case))


def test_worked_statistics():
    policy, reference = stats(LOGITS), stats(REFERENCE_LOGITS)
    np.testing.assert_allclose(policy.logp[MASK], (-0.407606, -0.407606, -1.458020), atol=1e-6)
    np.testing.assert_allclose(policy.lse[MASK], (1.407606, 2.407606, 1.458020), atol=1e-6)
    np.testing.assert_allclose(reference.logp[MASK], (-1.098612, -0.861995, -1.180270), atol=1e-6)
    np.testing.assert_allclose(reference.lse[MASK], (1.098612, 1.861995, 1.180270), atol=1e-6)


def test_worked_loss_and_gradient():
    def loss(logits, **options):
        return loss_of(stats(logits), stats(REFERENCE_LOGITS), REWARDS, MASK, beta=0.5, **options)

    expected = [[-0.661681, 0, 0], [0, 0, 0], [0.059572, -1.110379, 0.161932], [0.594873, 0.594873, -2.189747]]
    np.testing.assert_allclose(jax.grad(loss)(jnp.asarray(LOGITS)), expected, atol=2e-6)
    np.testing.assert_allclose(loss(LOGITS), 2.227921, atol=2e-6)
    np.testing.assert_allclose(loss(LOGITS, normalisation="mean_t"), 0.742640, atol=2e-6)
    squares = np.array([0.661681, 0.888875, 1.0]) ** 2
    np.testing.assert_allclose(loss(LOGITS, position_weight="inv_position"), squares @ (1, 1 / 2, 1 / 3), atol=2e-6)


@pytest.mark.parametrize("horizon", HORIZONS)
def test_single_action(x64, horizon):
    logits, reference, tokens, rewards, mask = random_sequence(0, length=1, actions=1)
    actual = residuals_of(stats(logits, tokens), stats(reference, tokens), rewards, mask, beta=0.3, horizon=horizon)
    q = 0.3 * (logits - reference)[0, tokens[0]]
    np.testing.assert_allclose(squared_residuals(actual, mask), (rewards[0] - q) ** 2, atol=1e-10)


# --- the definition --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("horizon, n", [("multi", None), ("one", None), ("n_step", 2), ("n_step", 4), ("n_step", 99)])
def test_residuals_match_their_definition_for_every_mask(x64, horizon, n):
    masks = np.array([[bits >> t & 1 for t in range(7)] for bits in range(128)], bool)
    logits, reference, tokens, rewards, _ = random_sequence(0)
    policy, reference = stats(logits, tokens), stats(reference, tokens)
    cases = [(g, shift, b) for g in (1.0, 0.9) for shift, b in ((True, None), (True, 0.7), (False, 0.7))]

    @jax.jit
    @jax.vmap
    def table(mask):
        return [
            bellman_residuals(
                policy,
                reference,
                rewards,
                mask,
                beta=0.4,
                gamma=gamma,
                horizon=horizon,
                n=n,
                value="lse_shift" if shift else "lse",
                bootstrap=bootstrap,
            )
            for gamma, shift, bootstrap in cases
        ]

    steps = {"multi": None, "one": 1}.get(horizon, n)
    for (gamma, shift, bootstrap), actual in zip(cases, table(masks), strict=True):
        options = {"beta": 0.4, "gamma": gamma, "steps": steps, "shift": shift, "bootstrap": bootstrap or 0.0}
        expected = [by_definition(policy[:2], reference[:2], rewards, mask, **options) for mask in masks]
        np.testing.assert_allclose(actual, expected, atol=1e-10)


@pytest.mark.parametrize("dtype, atol", [("float32", 1e-5), ("float64", 1e-10)])
@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_multi_step_is_a_sum_of_one_step_residuals(gamma, dtype, atol):
    with jax.enable_x64(dtype == "float64"):
        logits, reference, tokens, rewards, mask = random_sequence(1)
        arguments = stats(logits.astype(dtype), tokens), stats(reference.astype(dtype), tokens), rewards, mask
        one = np.asarray(residuals_of(*arguments, beta=0.4, gamma=gamma, horizon="one"))[mask]
        multi = np.asarray(residuals_of(*arguments, beta=0.4, gamma=gamma))[mask]
    suffix = [sum(gamma ** (k - t) * one[k] for k in range(t, len(one))) for t in range(len(one))]
    np.testing.assert_allclose(multi, suffix, atol=atol)


@pytest.mark.parametrize("dtype, atol", [("float32", 1e-5), ("float64", 1e-10)])
@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_one_step_is_the_bellman_error_of_shifted_logits(gamma, dtype, atol):
    with jax.enable_x64(dtype == "float64"):
        logits, reference, tokens, rewards, mask = random_sequence(2)
        policy, ref = stats(logits.astype(dtype), tokens), stats(reference.astype(dtype), tokens)
        actual = np.asarray(residuals_of(policy, ref, rewards, mask, beta=0.4, gamma=gamma, horizon="one"))[mask]
    q = 0.4 * (logits - reference)[np.arange(7), tokens][mask]
    v = np.append(0.4 * np.asarray(policy.lse - ref.lse)[mask], 0)
    np.testing.assert_allclose(actual, rewards[mask] + gamma * v[1:] - q, atol=atol)


@pytest.mark.parametrize("dtype, atol", [("float32", 1e-5), ("float64", 1e-10)])
@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_residuals_at_the_reference_are_rewards_and_returns(gamma, dtype, atol):
    with jax.enable_x64(dtype == "float64"):
        logits, _, tokens, rewards, mask = random_sequence(3)
        equal = stats(logits.astype(dtype), tokens)
        one = residuals_of(equal, equal, rewards, mask, beta=0.4, gamma=gamma, horizon="one")
        multi = residuals_of(equal, equal, rewards, mask, beta=0.4, gamma=gamma)
        loss = loss_of(equal, equal, rewards, mask, beta=0.4, gamma=gamma)
    action_rewards, num_actions = rewards[mask], mask.sum()
    returns = np.array(
        [sum(gamma ** (k - t) * action_rewards[k] for k in range(t, num_actions)) for t in range(num_actions)]
    )
    np.testing.assert_allclose(one, np.where(mask, rewards, 0), atol=atol)
    np.testing.assert_allclose(np.asarray(multi)[mask], returns, atol=atol)
    np.testing.assert_allclose(loss, np.sum(returns**2), rtol=10 * atol)


@pytest.mark.parametrize("horizon", HORIZONS)
def test_reference_is_optimal_without_rewards_only_with_the_shift(x64, horizon):
    logits, _, tokens, rewards, mask = random_sequence(4)

    def loss(logits, value):
        policy, reference = stats(logits, tokens), jax.lax.stop_gradient(stats(logits, tokens))
        actual = residuals_of(policy, reference, 0 * rewards, mask, beta=0.4, horizon=horizon, value=value)
        return squared_residuals(actual, mask)

    assert loss(logits, "lse_shift") < 1e-25
    assert np.max(np.abs(jax.grad(loss)(jnp.asarray(logits), "lse_shift"))) < 1e-12
    assert loss(logits, "lse") > 1e-2


@pytest.mark.parametrize("horizon", HORIZONS)
def test_common_offset_of_policy_and_reference_cancels(x64, horizon):
    logits, reference, tokens, rewards, mask = random_sequence(5)
    offset = np.random.default_rng(6).normal(size=(7, 1))

    def loss(logits, reference):
        policy, ref = stats(logits, tokens), stats(reference, tokens)
        return squared_residuals(residuals_of(policy, ref, rewards, mask, beta=0.4, horizon=horizon), mask)

    np.testing.assert_allclose(loss(logits + offset, reference + offset), loss(logits, reference), rtol=1e-10)
    assert abs(loss(logits + offset, reference) - loss(logits, reference)) > 1e-2


@pytest.mark.parametrize("value", ["lse_shift", "lse"])
def test_residuals_scale_with_rewards_and_beta(x64, value):
    scaled = residuals_of(stats(LOGITS), stats(REFERENCE_LOGITS), 3 * REWARDS, MASK, beta=1.5, value=value)
    np.testing.assert_allclose(scaled, 3 * worked(value=value), atol=1e-10)
    loss, scaled_loss = (squared_residuals(rho, MASK) for rho in (worked(value=value), scaled))
    np.testing.assert_allclose(scaled_loss, 9 * loss, rtol=1e-10)


@pytest.mark.parametrize("value", ["lse_shift", "lse"])
def test_value_of_the_common_prompt_cancels_in_a_pair(x64, value):
    first, second = random_sequence(7, actions=4), random_sequence(8, actions=7)
    residuals, soft_returns = [], []
    for logits, reference, tokens, rewards, mask in (first, second):
        mask[0] = True
        logits[0], reference[0] = first[0][0], first[1][0]
        policy, ref = stats(logits, tokens), stats(reference, tokens)
        residuals.append(residuals_of(policy, ref, rewards, mask, beta=0.4, value=value)[0])
        soft_returns.append(np.sum((rewards - 0.4 * (policy.logp - ref.logp))[mask]))
    np.testing.assert_allclose(residuals[0] - residuals[1], soft_returns[0] - soft_returns[1], atol=1e-10)


# --- options --------------------------------------------------------------------------------------------------------


def test_n_step_includes_one_and_multi(x64):
    for gamma in (1.0, 0.9):
        np.testing.assert_allclose(
            worked(gamma=gamma, horizon="n_step", n=1), worked(gamma=gamma, horizon="one"), atol=1e-12
        )
        for n in (3, 4, 50):
            np.testing.assert_allclose(worked(gamma=gamma, horizon="n_step", n=n), worked(gamma=gamma), atol=1e-12)
        assert np.abs(worked(gamma=gamma, horizon="n_step", n=2) - worked(gamma=gamma)).max() > 1e-2


def test_bootstrap_is_the_value_after_the_last_action(x64):
    logits, reference, tokens, rewards, _ = random_sequence(9)
    whole = stats(logits, tokens), stats(reference, tokens), rewards, np.ones(7, bool)
    cut = jax.tree.map(lambda x: x[:5], whole)
    rest = np.asarray(residuals_of(*whole, beta=0.4, gamma=0.9, horizon="one"))
    bootstrap = 0.4 * (whole[0].lse - whole[1].lse)[5]
    one = residuals_of(*cut, beta=0.4, gamma=0.9, horizon="one", bootstrap=bootstrap)
    np.testing.assert_allclose(one, rest[:5], atol=1e-12)
    multi = residuals_of(*cut, beta=0.4, gamma=0.9, bootstrap=bootstrap)
    suffix = [sum(0.9 ** (k - t) * rest[k] for k in range(t, 5)) for t in range(5)]
    np.testing.assert_allclose(multi, suffix, atol=1e-12)
    root = residuals_of(*cut, beta=0.4, gamma=0.9, horizon="trajectory", bootstrap=bootstrap)
    np.testing.assert_allclose(root, np.where(np.arange(5) == 0, multi, 0), atol=1e-12)


def test_given_values_replace_those_of_the_logits(x64):
    policy, reference = stats(LOGITS), stats(REFERENCE_LOGITS)
    values = 0.5 * (policy.lse - reference.lse)
    for horizon in ("multi", "one", "trajectory"):
        np.testing.assert_allclose(
            worked(horizon=horizon, value="given", values=values), worked(horizon=horizon), atol=1e-12
        )
    np.testing.assert_allclose(
        worked(horizon="trajectory", value="given", values=values[0]), worked(horizon="trajectory"), atol=1e-12
    )
    np.testing.assert_allclose(worked(value="none"), worked(value="given", values=0 * values), atol=1e-12)
    slope = jax.grad(lambda v: worked(horizon="trajectory", value="given", values=v)[0])(jnp.asarray(0.2))
    assert slope == -1


def test_lse_is_optional_if_unused():
    logp = stats(LOGITS).logp
    actual = residuals_of(TokenStats(logp, None), None, REWARDS, MASK, beta=0.5, value="none")
    np.testing.assert_allclose(actual[3], 1 - 0.5 * logp[3], atol=1e-6)


@pytest.mark.parametrize("value", ["lse_shift", "lse"])
def test_missing_reference_means_zeros(value):
    zeros = TokenStats(jnp.zeros(4), jnp.zeros(4))
    explicit = residuals_of(stats(LOGITS), zeros, REWARDS, MASK, beta=0.5, value=value)
    missing = residuals_of(stats(LOGITS), None, REWARDS, MASK, beta=0.5, value=value)
    np.testing.assert_array_equal(explicit, missing)


@pytest.mark.parametrize("horizon, n", [("multi", None), ("one", None), ("n_step", 2)])
@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_semi_gradient_changes_the_gradient_but_not_the_values(x64, horizon, n, gamma):
    def loss(logits, gradient):
        return squared_residuals(worked(logits, horizon=horizon, n=n, gamma=gamma, gradient=gradient), MASK)

    full, semi = (jax.value_and_grad(loss)(jnp.asarray(LOGITS), g) for g in ("full", "semi"))
    np.testing.assert_allclose(full[0], semi[0], rtol=1e-12)
    assert np.max(np.abs(full[1] - semi[1])) > 1e-2


def test_traced_options_match_static_options(x64):
    policy, reference = stats(LOGITS), stats(REFERENCE_LOGITS)
    traced = jax.jit(lambda beta, gamma: bellman_residuals(policy, reference, REWARDS, MASK, beta=beta, gamma=gamma))
    for gamma in (1.0, 0.9):
        np.testing.assert_allclose(traced(0.5, gamma), worked(gamma=gamma), atol=1e-12)
    slope = jax.grad(lambda beta: traced(beta, 1.0)[0])(0.5)
    np.testing.assert_allclose(slope, (worked(beta=0.6)[0] - worked(beta=0.4)[0]) / 0.2, atol=1e-9)


# --- gradients -------------------------------------------------------------------------------------------------------


def closed_form_gradient(horizon, gradient, beta, gamma, logits, tokens, mask, rho):
    """Gradient [T, V] of the sum of squares of the residuals rho with respect to the logits."""
    actions, expected = np.flatnonzero(mask), np.zeros_like(logits)
    discounted, previous = 0.0, 0.0  # sum over j <= k of gamma^(k-j) rho_j, and rho_{k-1}
    for k, t in enumerate(actions):
        onehot, pi = np.eye(logits.shape[1])[tokens[t]], np.exp(logits[t]) / np.exp(logits[t]).sum()
        discounted = rho[t] + gamma * discounted
        expected[t] = {
            ("multi", "full"): -2 * beta * (discounted * (onehot - pi) + rho[t] * pi),
            ("one", "full"): -2 * beta * rho[t] * onehot + 2 * beta * gamma * previous * pi,
            ("trajectory", "full"): -2 * beta * rho[actions[0]] * (gamma**k * (onehot - pi) + (k == 0) * pi),
        }.get((horizon, gradient), -2 * beta * rho[t] * onehot)
        previous = rho[t]
    return expected


@pytest.mark.parametrize("gamma", [1.0, 0.9])
@pytest.mark.parametrize(
    "horizon, gradient",
    [("multi", "full"), ("one", "full"), ("trajectory", "full"), ("multi", "semi"), ("one", "semi")],
)
def test_gradient_in_closed_form(x64, horizon, gradient, gamma):
    """The formulas are the same with and without the shift, and the reference gets no gradient."""

    @partial(jax.jit, static_argnames="value")
    @partial(jax.grad, argnums=(0, 1), has_aux=True)
    def gradients(logits, reference, tokens, rewards, mask, value):
        policy, ref = (token_stats_from_logits(x, tokens) for x in (logits, reference))
        options = {"beta": 0.4, "gamma": gamma, "horizon": horizon, "value": value, "gradient": gradient}
        rho = bellman_residuals(policy, ref, rewards, mask, **options)
        return squared_residuals(rho, mask), rho

    for seed in range(5):
        logits, reference, tokens, rewards, mask = random_sequence(10 + seed)
        for value in ("lse_shift", "lse"):
            (actual, reference_gradient), rho = gradients(logits, reference, tokens, rewards, mask, value=value)
            expected = closed_form_gradient(horizon, gradient, 0.4, gamma, logits, tokens, mask, np.asarray(rho))
            np.testing.assert_allclose(actual, expected, atol=1e-12)
            np.testing.assert_array_equal(reference_gradient, 0)


# --- masks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [1.0, 0.9])
@pytest.mark.parametrize("horizon, n", [("multi", None), ("one", None), ("trajectory", None), ("n_step", 2)])
def test_tokens_between_actions_do_not_matter(x64, horizon, n, gamma):
    """Inserting random masked tokens between and after the actions leaves the residuals unchanged."""
    actions = random_sequence(20, length=5, actions=5)
    noise = random_sequence(21, length=12)
    positions = np.array([0, 3, 4, 8, 10])
    mixed = [x.copy() for x in noise]
    for array, x in zip(mixed, actions):
        array[positions] = x
    mixed[4][:] = np.isin(np.arange(12), positions)

    def residuals(example):
        logits, reference, tokens, rewards, mask = example
        policy, ref = stats(logits, tokens), stats(reference, tokens)
        return residuals_of(policy, ref, rewards, mask, beta=0.4, gamma=gamma, horizon=horizon, n=n)

    actual = np.asarray(residuals(mixed))
    np.testing.assert_allclose(actual[positions], residuals(actions), atol=1e-12)
    np.testing.assert_array_equal(actual[~mixed[4]], 0)


@partial(jax.jit, static_argnames=("gamma", "normalisation", "position_weight"))
def loss_and_gradients(policy, reference, rewards, mask, **options):
    def loss(policy, reference, rewards):
        return loss_of(policy, reference, rewards, mask, beta=0.4, **options)

    return jax.value_and_grad(loss, (0, 1, 2))(policy, reference, rewards)


@pytest.mark.parametrize(
    "options", [{}, {"gamma": 0.9}, {"normalisation": "mean_t"}, {"position_weight": "inv_position"}], ids=str
)
@given(seed=st.integers(0, 2**20), bits=st.integers(0, 127), bad=st.sampled_from([np.nan, np.inf, -np.inf, 1e38]))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_masked_positions_do_not_affect_loss_or_gradient(options, seed, bits, bad):
    mask = np.array([bits >> t & 1 for t in range(7)], bool)
    logits, reference, tokens, rewards, _ = random_sequence(seed)
    clean = (stats(logits, tokens), stats(reference, tokens), np.float32(rewards))
    dirty = jax.tree.map(lambda x: np.where(mask, x, np.float32(bad)), clean)
    expected, actual = loss_and_gradients(*clean, mask, **options), loss_and_gradients(*dirty, mask, **options)
    chex.assert_trees_all_equal(actual, expected)
    assert not any(np.asarray(gradient)[~mask].any() for gradient in jax.tree.leaves(actual[1]))


@pytest.mark.parametrize("normalisation", ["sum_t", "mean_t"])
@pytest.mark.parametrize("position_weight", ["none", "inv_position"])
def test_loss_and_gradient_without_actions_are_zero(normalisation, position_weight):
    def loss(policy):
        return loss_of(
            policy, None, REWARDS, 0 * MASK, beta=0.5, normalisation=normalisation, position_weight=position_weight
        )

    value, gradient = jax.value_and_grad(loss)(stats(LOGITS))
    assert value == 0
    assert not np.any(gradient.logp) and not np.any(gradient.lse)


def test_mask_of_zeros_and_ones():
    integers = residuals_of(stats(LOGITS), stats(REFERENCE_LOGITS), REWARDS, np.array([1, 0, 1, 1]), beta=0.5)
    np.testing.assert_array_equal(integers, worked())


# --- jax -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_batches_by_vmap(x64, gamma):
    examples = [random_sequence(30 + i) for i in range(6)]
    logits, reference, tokens, rewards, mask = map(np.stack, zip(*examples))

    def loss(*example):
        logits, reference, tokens, rewards, mask = example
        return loss_of(stats(logits, tokens), stats(reference, tokens), rewards, mask, beta=0.4, gamma=gamma)

    batched = jax.jit(jax.vmap(loss))
    actual = batched(logits, reference, tokens, rewards, mask)
    np.testing.assert_allclose(actual, [loss(*example) for example in examples], rtol=1e-12)
    order = np.array([4, 2, 0, 5, 1, 3])
    permuted = batched(*(x[order] for x in (logits, reference, tokens, rewards, mask)))
    np.testing.assert_allclose(permuted, actual[order], rtol=1e-12)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_low_precision_inputs_are_cast_to_float32_first(dtype):
    low_precision = jax.tree.map(
        lambda x: x.astype(dtype), (stats(LOGITS), stats(REFERENCE_LOGITS), jnp.asarray(REWARDS))
    )
    float32 = jax.tree.map(lambda x: x.astype(jnp.float32), low_precision)
    for options in ({}, {"gamma": 0.9}):
        actual = loss_of(*low_precision, MASK, beta=0.5, **options)
        assert actual.dtype == jnp.float32
        np.testing.assert_array_equal(actual, loss_of(*float32, MASK, beta=0.5, **options))
    gradient = jax.grad(lambda p: loss_of(p, *low_precision[1:], MASK, beta=0.5))(low_precision[0])
    assert gradient.logp.dtype == gradient.lse.dtype == dtype


def test_no_loop_over_the_sequence():
    """Discounted returns use parallel scans: the program contains no sequential loop."""
    for gamma in (1.0, 0.9):
        loss = partial(shiq_loss, reference=None, rewards=REWARDS, action_mask=MASK, beta=0.5, gamma=gamma)
        text = str(jax.make_jaxpr(jax.grad(loss))(stats(LOGITS)))
        assert "scan[" not in text and "while[" not in text


def test_long_sequences_in_single_precision():
    length = 4096
    random = np.random.default_rng(40)
    policy, reference = (TokenStats(*random.normal(size=(2, length)) - 2) for _ in "ab")
    rewards = np.zeros(length)
    rewards[-1] = 1
    mask = random.random(length) < 0.8
    for gamma in (1.0, 0.999):
        actual = jax.jit(partial(bellman_residuals, beta=0.1, gamma=gamma))(policy, reference, rewards, mask)
        x = rewards - 0.1 * (policy.logp - reference.logp)
        suffix, total = np.zeros(length), 0.0
        for t in np.flatnonzero(mask)[::-1]:
            total = x[t] + gamma * total
            suffix[t] = total - 0.1 * (policy.lse - reference.lse)[t]
        assert np.max(np.abs(actual - suffix)) < 2e-5 * np.max(np.abs(suffix))


# --- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        ({"beta": 0}, "beta is 0"),
        ({"beta": float("inf")}, "beta is inf"),
        ({"gamma": 0.0}, "gamma is 0.0"),
        ({"gamma": 1.5}, "gamma is 1.5"),
        ({"gamma": float("nan")}, "gamma is nan"),
        ({"horizon": "two"}, "horizon is 'two'"),
        ({"value": "head"}, "value is 'head'"),
        ({"gradient": "half"}, "gradient is 'half'"),
        ({"horizon": "trajectory", "gradient": "semi"}, "first token only"),
        ({"horizon": "n_step"}, "n is None"),
        ({"horizon": "n_step", "n": 0}, "n is 0"),
        ({"horizon": "n_step", "n": 1.5}, "n is 1.5"),
        ({"n": 2}, "n is 2 with horizon='multi'"),
        ({"value": "given"}, "values are missing"),
        ({"values": np.zeros(4)}, "values are present"),
        ({"value": "given", "values": np.zeros(3)}, r"values has shape \(3,\) but action_mask has shape \(4,\)"),
        ({"value": "given", "values": np.zeros(())}, r"values has shape \(\)"),
        ({"bootstrap": np.zeros(4)}, r"bootstrap has shape \(4,\)"),
    ],
)
def test_invalid_options_are_rejected(options, message):
    with pytest.raises(ValueError, match=message):
        worked(**options)


def test_mismatched_shapes_are_rejected():
    policy, reference = stats(LOGITS), stats(REFERENCE_LOGITS)
    short = jax.tree.map(lambda x: x[:3], policy)
    with pytest.raises(ValueError, match=r"policy.logp has shape \(3,\) but action_mask has shape \(4,\)"):
        residuals_of(short, reference, REWARDS, MASK, beta=0.5)
    with pytest.raises(ValueError, match="reference.logp"):
        residuals_of(policy, short, REWARDS, MASK, beta=0.5)
    with pytest.raises(ValueError, match="rewards"):
        residuals_of(policy, reference, REWARDS[-1], MASK, beta=0.5)
    with pytest.raises(ValueError, match="policy.lse is missing"):
        residuals_of(TokenStats(policy.logp, None), reference, REWARDS, MASK, beta=0.5)
    with pytest.raises(ValueError, match="use jax.vmap"):
        loss_of(policy, reference, REWARDS, MASK[None], beta=0.5)


def test_invalid_reductions_are_rejected():
    with pytest.raises(ValueError, match="normalisation is 'token_mean'"):
        squared_residuals(worked(), MASK, normalisation="token_mean")
    with pytest.raises(ValueError, match="position_weight is 'linear'"):
        squared_residuals(worked(), MASK, position_weight="linear")
    with pytest.raises(ValueError, match="residuals has shape"):
        squared_residuals(worked()[:2], MASK)
