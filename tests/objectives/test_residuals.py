"""The residual function and the ShiQ loss against hand-computed numbers, their definition and their derivatives."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shiq_jax.objectives import TokenStats, bellman_residuals, shiq_loss, squared_residuals, token_stats_from_logits

HORIZONS = ("multi", "one", "trajectory")

# A worked example: four positions, three tokens, the second position not an action.
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


def draw(seed, length=7, vocabulary=5, actions=None):
    """Logits with an offset per state, the same of a reference, tokens, rewards, and a mask with so many actions."""
    random = np.random.default_rng(seed)
    logits, reference = (random.normal(size=(length, vocabulary)) + 3 * random.normal(size=(length, 1)) for _ in "ab")
    mask = np.zeros(length, bool)
    count = int(random.integers(2, length + 1)) if actions is None else actions
    mask[random.choice(length, count, replace=False)] = True
    return logits, reference, random.integers(0, vocabulary, length), random.normal(size=length), mask


def by_definition(policy, reference, rewards, mask, *, beta, gamma, steps, shift, bootstrap):
    """Residuals by a double loop over the actions, in numpy, every sum written out; steps=None means to the end."""
    at = np.flatnonzero(mask)
    logp, lse, ref_logp, ref_lse = (np.asarray(a, float)[at] for a in (*policy, *reference))
    x = rewards[at] - beta * (logp - ref_logp)
    v = np.append(beta * (lse - (ref_lse if shift else 0)), bootstrap)
    residuals = np.zeros(len(mask))
    for t in range(len(at)):
        end = len(at) if steps is None else min(t + steps, len(at))
        target = sum(gamma ** (k - t) * x[k] for k in range(t, end)) + gamma ** (end - t) * v[end]
        residuals[at[t]] = target - v[t]
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
        found = table(LOGITS.astype(dtype), REFERENCE_LOGITS.astype(dtype))
    for (*case, residuals, loss), (found_residuals, found_loss) in zip(WORKED, found, strict=True):
        assert found_residuals.dtype == dtype
        np.testing.assert_allclose(found_residuals, np.insert(residuals, 1, 0), atol=2e-6, err_msg=str(case))
        np.testing.assert_allclose(found_loss, loss, atol=2e-6, err_msg=str(case))


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
def test_bandit(x64, horizon):
    logits, reference, tokens, rewards, mask = draw(0, length=1, actions=1)
    found = residuals_of(stats(logits, tokens), stats(reference, tokens), rewards, mask, beta=0.3, horizon=horizon)
    gap = (logits - reference)[0, tokens[0]]
    np.testing.assert_allclose(squared_residuals(found, mask), (rewards[0] - 0.3 * gap) ** 2, atol=1e-10)


# --- the definition --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("horizon, n", [("multi", None), ("one", None), ("n_step", 2), ("n_step", 4), ("n_step", 99)])
def test_residuals_are_their_definition_under_every_mask(x64, horizon, n):
    masks = np.array([[bits >> t & 1 for t in range(7)] for bits in range(128)], bool)
    logits, reference, tokens, rewards, _ = draw(0)
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
    for (gamma, shift, bootstrap), found in zip(cases, table(masks), strict=True):
        options = {"beta": 0.4, "gamma": gamma, "steps": steps, "shift": shift, "bootstrap": bootstrap or 0.0}
        expected = [by_definition(policy[:2], reference[:2], rewards, mask, **options) for mask in masks]
        np.testing.assert_allclose(found, expected, atol=1e-10)


@pytest.mark.parametrize("dtype, atol", [("float32", 1e-5), ("float64", 1e-10)])
@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_multi_step_telescopes(gamma, dtype, atol):
    with jax.enable_x64(dtype == "float64"):
        logits, reference, tokens, rewards, mask = draw(1)
        arguments = stats(logits.astype(dtype), tokens), stats(reference.astype(dtype), tokens), rewards, mask
        one = np.asarray(residuals_of(*arguments, beta=0.4, gamma=gamma, horizon="one"))[mask]
        multi = np.asarray(residuals_of(*arguments, beta=0.4, gamma=gamma))[mask]
    suffix = [sum(gamma ** (k - t) * one[k] for k in range(t, len(one))) for t in range(len(one))]
    np.testing.assert_allclose(multi, suffix, atol=atol)


@pytest.mark.parametrize("dtype, atol", [("float32", 1e-5), ("float64", 1e-10)])
@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_one_step_is_the_bellman_error_of_shifted_logits(gamma, dtype, atol):
    with jax.enable_x64(dtype == "float64"):
        logits, reference, tokens, rewards, mask = draw(2)
        policy, ref = stats(logits.astype(dtype), tokens), stats(reference.astype(dtype), tokens)
        found = np.asarray(residuals_of(policy, ref, rewards, mask, beta=0.4, gamma=gamma, horizon="one"))[mask]
    q = 0.4 * (logits - reference)[np.arange(7), tokens][mask]
    v = np.append(0.4 * np.asarray(policy.lse - ref.lse)[mask], 0)
    np.testing.assert_allclose(found, rewards[mask] + gamma * v[1:] - q, atol=atol)


@pytest.mark.parametrize("dtype, atol", [("float32", 1e-5), ("float64", 1e-10)])
@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_at_the_reference_residuals_are_rewards_and_returns(gamma, dtype, atol):
    with jax.enable_x64(dtype == "float64"):
        logits, _, tokens, rewards, mask = draw(3)
        both = stats(logits.astype(dtype), tokens)
        one = residuals_of(both, both, rewards, mask, beta=0.4, gamma=gamma, horizon="one")
        multi = residuals_of(both, both, rewards, mask, beta=0.4, gamma=gamma)
        loss = loss_of(both, both, rewards, mask, beta=0.4, gamma=gamma)
    at = rewards[mask]
    returns = np.array([sum(gamma ** (k - t) * at[k] for k in range(t, len(at))) for t in range(len(at))])
    np.testing.assert_allclose(one, np.where(mask, rewards, 0), atol=atol)
    np.testing.assert_allclose(np.asarray(multi)[mask], returns, atol=atol)
    np.testing.assert_allclose(loss, np.sum(returns**2), rtol=10 * atol)


@pytest.mark.parametrize("horizon", HORIZONS)
def test_without_reward_the_shift_leaves_the_reference_alone(x64, horizon):
    logits, _, tokens, rewards, mask = draw(4)

    def loss(logits, value):
        policy, reference = stats(logits, tokens), jax.lax.stop_gradient(stats(logits, tokens))
        found = residuals_of(policy, reference, 0 * rewards, mask, beta=0.4, horizon=horizon, value=value)
        return squared_residuals(found, mask)

    assert loss(logits, "lse_shift") < 1e-25
    assert np.max(np.abs(jax.grad(loss)(jnp.asarray(logits), "lse_shift"))) < 1e-12
    assert loss(logits, "lse") > 1e-2


@pytest.mark.parametrize("horizon", HORIZONS)
def test_gauge(x64, horizon):
    logits, reference, tokens, rewards, mask = draw(5)
    offset = np.random.default_rng(6).normal(size=(7, 1))

    def loss(logits, reference):
        policy, ref = stats(logits, tokens), stats(reference, tokens)
        return squared_residuals(residuals_of(policy, ref, rewards, mask, beta=0.4, horizon=horizon), mask)

    np.testing.assert_allclose(loss(logits + offset, reference + offset), loss(logits, reference), rtol=1e-10)
    assert abs(loss(logits + offset, reference) - loss(logits, reference)) > 1e-2


@pytest.mark.parametrize("value", ["lse_shift", "lse"])
def test_scale(x64, value):
    scaled = residuals_of(stats(LOGITS), stats(REFERENCE_LOGITS), 3 * REWARDS, MASK, beta=1.5, value=value)
    np.testing.assert_allclose(scaled, 3 * worked(value=value), atol=1e-10)
    loss, scaled_loss = (squared_residuals(rho, MASK) for rho in (worked(value=value), scaled))
    np.testing.assert_allclose(scaled_loss, 9 * loss, rtol=1e-10)


@pytest.mark.parametrize("value", ["lse_shift", "lse"])
def test_values_of_a_common_prompt_cancel_in_a_pair(x64, value):
    first, second = draw(7, actions=4), draw(8, actions=7)
    roots, plain = [], []
    for logits, reference, tokens, rewards, mask in (first, second):
        mask[0] = True
        logits[0], reference[0] = first[0][0], first[1][0]
        policy, ref = stats(logits, tokens), stats(reference, tokens)
        root = residuals_of(policy, ref, rewards, mask, beta=0.4, value=value)[0]
        roots.append(root)
        plain.append(np.sum((rewards - 0.4 * (policy.logp - ref.logp))[mask]))
    np.testing.assert_allclose(roots[0] - roots[1], plain[0] - plain[1], atol=1e-10)


# --- the axes --------------------------------------------------------------------------------------------------------


def test_n_step_between_one_and_multi(x64):
    for gamma in (1.0, 0.9):
        np.testing.assert_allclose(
            worked(gamma=gamma, horizon="n_step", n=1), worked(gamma=gamma, horizon="one"), atol=1e-12
        )
        for n in (3, 4, 50):
            np.testing.assert_allclose(worked(gamma=gamma, horizon="n_step", n=n), worked(gamma=gamma), atol=1e-12)
        assert np.abs(worked(gamma=gamma, horizon="n_step", n=2) - worked(gamma=gamma)).max() > 1e-2


def test_bootstrap_is_the_value_after_the_last_action(x64):
    logits, reference, tokens, rewards, _ = draw(9)
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


def test_given_values_stand_in_for_the_logits(x64):
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


def test_without_lse_the_values_that_do_not_read_it_still_work():
    logp = stats(LOGITS).logp
    found = residuals_of(TokenStats(logp, None), None, REWARDS, MASK, beta=0.5, value="none")
    np.testing.assert_allclose(found[3], 1 - 0.5 * logp[3], atol=1e-6)


@pytest.mark.parametrize("value", ["lse_shift", "lse"])
def test_no_reference_means_zeros(value):
    zeros = TokenStats(jnp.zeros(4), jnp.zeros(4))
    given = residuals_of(stats(LOGITS), zeros, REWARDS, MASK, beta=0.5, value=value)
    absent = residuals_of(stats(LOGITS), None, REWARDS, MASK, beta=0.5, value=value)
    np.testing.assert_array_equal(given, absent)


@pytest.mark.parametrize("horizon, n", [("multi", None), ("one", None), ("n_step", 2)])
@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_semi_gradient_has_the_same_values_and_another_gradient(x64, horizon, n, gamma):
    def loss(logits, gradient):
        return squared_residuals(worked(logits, horizon=horizon, n=n, gamma=gamma, gradient=gradient), MASK)

    full, semi = (jax.value_and_grad(loss)(jnp.asarray(LOGITS), g) for g in ("full", "semi"))
    np.testing.assert_allclose(full[0], semi[0], rtol=1e-12)
    assert np.max(np.abs(full[1] - semi[1])) > 1e-2


def test_traced_options_agree_with_static_ones(x64):
    policy, reference = stats(LOGITS), stats(REFERENCE_LOGITS)
    traced = jax.jit(lambda beta, gamma: bellman_residuals(policy, reference, REWARDS, MASK, beta=beta, gamma=gamma))
    for gamma in (1.0, 0.9):
        np.testing.assert_allclose(traced(0.5, gamma), worked(gamma=gamma), atol=1e-12)
    slope = jax.grad(lambda beta: traced(beta, 1.0)[0])(0.5)
    np.testing.assert_allclose(slope, (worked(beta=0.6)[0] - worked(beta=0.4)[0]) / 0.2, atol=1e-9)


# --- gradients -------------------------------------------------------------------------------------------------------


def closed_form_gradient(horizon, gradient, beta, gamma, logits, tokens, mask, rho):
    """The gradient [T, V] of the summed squares of the residuals rho with respect to logits [T, V]."""
    at, expected = np.flatnonzero(mask), np.zeros_like(logits)
    carried, before = 0.0, 0.0  # sum over j <= k of gamma^(k-j) rho_j, and rho_{k-1}
    for k, t in enumerate(at):
        chosen, pi = np.eye(logits.shape[1])[tokens[t]], np.exp(logits[t]) / np.exp(logits[t]).sum()
        carried = rho[t] + gamma * carried
        expected[t] = {
            ("multi", "full"): -2 * beta * (carried * (chosen - pi) + rho[t] * pi),
            ("one", "full"): -2 * beta * rho[t] * chosen + 2 * beta * gamma * before * pi,
            ("trajectory", "full"): -2 * beta * rho[at[0]] * (gamma**k * (chosen - pi) + (k == 0) * pi),
        }.get((horizon, gradient), -2 * beta * rho[t] * chosen)
        before = rho[t]
    return expected


@pytest.mark.parametrize("gamma", [1.0, 0.9])
@pytest.mark.parametrize(
    "horizon, gradient",
    [("multi", "full"), ("one", "full"), ("trajectory", "full"), ("multi", "semi"), ("one", "semi")],
)
def test_gradient_in_closed_form(x64, horizon, gradient, gamma):
    """The same formulas with the shift and without it: the reference is a constant, and gets no gradient."""

    @partial(jax.jit, static_argnames="value")
    @partial(jax.grad, argnums=(0, 1), has_aux=True)
    def gradients(logits, reference, tokens, rewards, mask, value):
        policy, ref = (token_stats_from_logits(x, tokens) for x in (logits, reference))
        options = {"beta": 0.4, "gamma": gamma, "horizon": horizon, "value": value, "gradient": gradient}
        rho = bellman_residuals(policy, ref, rewards, mask, **options)
        return squared_residuals(rho, mask), rho

    for seed in range(5):
        logits, reference, tokens, rewards, mask = draw(10 + seed)
        for value in ("lse_shift", "lse"):
            (found, to_reference), rho = gradients(logits, reference, tokens, rewards, mask, value=value)
            expected = closed_form_gradient(horizon, gradient, 0.4, gamma, logits, tokens, mask, np.asarray(rho))
            np.testing.assert_allclose(found, expected, atol=1e-12)
            np.testing.assert_array_equal(to_reference, 0)


# --- masks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [1.0, 0.9])
@pytest.mark.parametrize("horizon, n", [("multi", None), ("one", None), ("trajectory", None), ("n_step", 2)])
def test_tokens_of_others_do_not_exist(x64, horizon, n, gamma):
    """Actions alone, and the same with positions inserted between them and padding after them, which hold anything."""
    actions = draw(20, length=5, actions=5)
    noise = draw(21, length=12)
    where = np.array([0, 3, 4, 8, 10])
    mixed = [x.copy() for x in noise]
    for spread, x in zip(mixed, actions):
        spread[where] = x
    mixed[4][:] = np.isin(np.arange(12), where)

    def residuals(example):
        logits, reference, tokens, rewards, mask = example
        policy, ref = stats(logits, tokens), stats(reference, tokens)
        return residuals_of(policy, ref, rewards, mask, beta=0.4, gamma=gamma, horizon=horizon, n=n)

    spread = np.asarray(residuals(mixed))
    np.testing.assert_allclose(spread[where], residuals(actions), atol=1e-12)
    np.testing.assert_array_equal(spread[~mixed[4]], 0)


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
def test_masked_positions_may_hold_anything(options, seed, bits, bad):
    mask = np.array([bits >> t & 1 for t in range(7)], bool)
    logits, reference, tokens, rewards, _ = draw(seed)
    clean = (stats(logits, tokens), stats(reference, tokens), np.float32(rewards))
    dirty = jax.tree.map(lambda x: np.where(mask, x, np.float32(bad)), clean)
    expected, found = loss_and_gradients(*clean, mask, **options), loss_and_gradients(*dirty, mask, **options)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert not any(np.asarray(gradient)[~mask].any() for gradient in jax.tree.leaves(found[1]))


@pytest.mark.parametrize("normalisation", ["sum_t", "mean_t"])
@pytest.mark.parametrize("position_weight", ["none", "inv_position"])
def test_a_sequence_without_actions_contributes_nothing(normalisation, position_weight):
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
    examples = [draw(30 + i) for i in range(6)]
    logits, reference, tokens, rewards, mask = map(np.stack, zip(*examples))

    def loss(*example):
        logits, reference, tokens, rewards, mask = example
        return loss_of(stats(logits, tokens), stats(reference, tokens), rewards, mask, beta=0.4, gamma=gamma)

    batched = jax.jit(jax.vmap(loss))
    found = batched(logits, reference, tokens, rewards, mask)
    np.testing.assert_allclose(found, [loss(*example) for example in examples], rtol=1e-12)
    order = np.array([4, 2, 0, 5, 1, 3])
    permuted = batched(*(x[order] for x in (logits, reference, tokens, rewards, mask)))
    np.testing.assert_allclose(permuted, found[order], rtol=1e-12)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_narrow_inputs_are_widened_first(dtype):
    narrow = jax.tree.map(lambda x: x.astype(dtype), (stats(LOGITS), stats(REFERENCE_LOGITS), jnp.asarray(REWARDS)))
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), narrow)
    for options in ({}, {"gamma": 0.9}):
        found = loss_of(*narrow, MASK, beta=0.5, **options)
        assert found.dtype == jnp.float32
        np.testing.assert_array_equal(found, loss_of(*wide, MASK, beta=0.5, **options))
    gradient = jax.grad(lambda p: loss_of(p, *narrow[1:], MASK, beta=0.5))(narrow[0])
    assert gradient.logp.dtype == gradient.lse.dtype == dtype


def test_no_loop_over_the_sequence():
    """Suffix sums and next values are parallel: the program holds no sequential loop."""
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
        found = jax.jit(partial(bellman_residuals, beta=0.1, gamma=gamma))(policy, reference, rewards, mask)
        x = rewards - 0.1 * (policy.logp - reference.logp)
        suffix, total = np.zeros(length), 0.0
        for t in np.flatnonzero(mask)[::-1]:
            total = x[t] + gamma * total
            suffix[t] = total - 0.1 * (policy.lse - reference.lse)[t]
        assert np.max(np.abs(found - suffix)) < 2e-5 * np.max(np.abs(suffix))


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, words",
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
        ({"value": "given"}, "values are absent"),
        ({"values": np.zeros(4)}, "values are present"),
        ({"value": "given", "values": np.zeros(3)}, r"values has shape \(3,\) but action_mask has shape \(4,\)"),
        ({"value": "given", "values": np.zeros(())}, r"values has shape \(\)"),
        ({"bootstrap": np.zeros(4)}, r"bootstrap has shape \(4,\)"),
    ],
)
def test_options_out_of_range(options, words):
    with pytest.raises(ValueError, match=words):
        worked(**options)


def test_shapes_that_disagree():
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


def test_reductions_out_of_range():
    with pytest.raises(ValueError, match="normalisation is 'token_mean'"):
        squared_residuals(worked(), MASK, normalisation="token_mean")
    with pytest.raises(ValueError, match="position_weight is 'linear'"):
        squared_residuals(worked(), MASK, position_weight="linear")
    with pytest.raises(ValueError, match="residuals has shape"):
        squared_residuals(worked()[:2], MASK)
