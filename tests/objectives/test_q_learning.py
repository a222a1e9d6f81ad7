"""Q-learning losses against loops over actions: values, gradients and masking."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shiq_jax.objectives import TokenStats, q_learning, token_stats_from_logits

T, V = 9, 7
MASK = np.array([0, 1, 1, 0, 0, 1, 1, 1, 0], bool)
ACTIONS = np.flatnonzero(MASK)


@pytest.fixture
def data(x64):
    """Outputs [T, V] of two Q heads and their target copies, state values, rewards and tokens."""
    random = np.random.default_rng(0)
    heads, targets = random.normal(size=(2, 2, T, V))
    return {
        "heads": heads, "targets": targets, "v": random.normal(size=T), "rewards": random.normal(size=T),
        "tokens": random.integers(0, V, T),
    }  # fmt: skip


def stats(heads, tokens):
    return tuple(token_stats_from_logits(jnp.asarray(q), tokens) for q in heads)


def cross_entropy(data, heads):
    return sum(jax.nn.logsumexp(head[t]) - head[t, data["tokens"][t]] for head in heads for t in ACTIONS)


def next_action(t):
    later = ACTIONS[ACTIONS > t]
    return later[0] if len(later) else None


@pytest.mark.parametrize("bootstrap", [None, 0.8])
def test_ilql_matches_its_formula(data, bootstrap):
    q_values = lambda heads, t: heads[:, t, data["tokens"][t]]
    total = 0.0
    for t in ACTIONS:
        following = next_action(t)
        next_value = data["v"][following] if following is not None else bootstrap or 0.0
        min_q, value = q_values(data["targets"], t).min(), data["v"][t]
        weight = 0.8 if min_q >= value else 1 - 0.8
        total += ((q_values(data["heads"], t) - data["rewards"][t] - 0.9 * next_value) ** 2).sum() / 2
        total += weight * (value - min_q) ** 2 / 2
    total += 0.3 * cross_entropy(data, data["heads"])
    loss = q_learning.ilql_loss(
        stats(data["heads"], data["tokens"]), data["v"], stats(data["targets"], data["tokens"]), data["rewards"], MASK,
        gamma=0.9, tau=0.8, alpha=0.3, bootstrap=bootstrap,
    )  # fmt: skip
    np.testing.assert_allclose(loss, total, atol=1e-10)


@pytest.mark.parametrize("bootstrap", [None, 0.8])
def test_cql_matches_its_formula(data, bootstrap):
    total = 0.3 * cross_entropy(data, data["heads"])
    for t in ACTIONS:
        following = next_action(t)
        next_value = bootstrap or 0.0
        if following is not None:
            next_value = data["targets"][:, following, data["tokens"][following]].min()
        error = data["heads"][:, t, data["tokens"][t]] - data["rewards"][t] - 0.9 * next_value
        total += (error**2).sum() / 2
    loss = q_learning.cql_loss(
        stats(data["heads"], data["tokens"]), stats(data["targets"], data["tokens"]), data["rewards"], MASK,
        gamma=0.9, alpha=0.3, bootstrap=bootstrap,
    )  # fmt: skip
    np.testing.assert_allclose(loss, total, atol=1e-10)


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_mc_returns_matches_its_formula(data, gamma):
    total, target = 0.3 * cross_entropy(data, data["heads"][:1]), 0.8
    for t in ACTIONS[::-1]:
        target = data["rewards"][t] + gamma * target
        total += (data["heads"][0, t, data["tokens"][t]] - target) ** 2 / 2
    (head,) = stats(data["heads"][:1], data["tokens"])
    loss = q_learning.mc_returns_loss(head, data["rewards"], MASK, gamma=gamma, alpha=0.3, bootstrap=0.8)
    np.testing.assert_allclose(loss, total, atol=1e-10)


def test_soft_q_matches_its_formula(data):
    lse = np.asarray(jax.nn.logsumexp(data["targets"][0], axis=-1))
    total, branches = 0.0, set()
    for t in ACTIONS:
        following = next_action(t)
        next_value = lse[following] if following is not None else 0
        error = abs(data["rewards"][t] + next_value - data["heads"][0, t, data["tokens"][t]])
        total += error**2 / 2 if error <= 1.5 else 1.5 * (error - 0.75)
        branches.add(error <= 1.5)
    assert branches == {True, False}
    (head,) = stats(data["heads"][:1], data["tokens"])
    np.testing.assert_allclose(q_learning.soft_q_loss(head, lse, data["rewards"], MASK, delta=1.5), total, atol=1e-10)


def losses(data):
    """Each loss as a function of (heads, v)."""
    targets = stats(data["targets"], data["tokens"])
    rest = data["rewards"], MASK
    return {
        "ilql": lambda heads, v: q_learning.ilql_loss(stats(heads, data["tokens"]), v, targets, *rest),
        "cql": lambda heads, v: q_learning.cql_loss(stats(heads, data["tokens"]), targets, *rest),
        "mc_returns": lambda heads, v: q_learning.mc_returns_loss(stats(heads, data["tokens"])[0], *rest),
        "soft_q": lambda heads, v: q_learning.soft_q_loss(stats(heads, data["tokens"])[0], targets[0].lse, *rest),
    }


def test_gradients_match_finite_differences_and_only_ilql_trains_v(data):
    for name, loss in losses(data).items():
        gradient, v_gradient = jax.jit(jax.grad(loss, (0, 1)))(data["heads"], data["v"])
        direction = np.random.default_rng(1).normal(size=data["heads"].shape)
        ends = [loss(data["heads"] + sign * 1e-6 * direction, data["v"]) for sign in (1, -1)]
        np.testing.assert_allclose((gradient * direction).sum(), (ends[0] - ends[1]) / 2e-6, rtol=1e-6, err_msg=name)
        assert not np.any(gradient[:, ~MASK])
        if name != "ilql":
            assert not np.any(v_gradient)
            continue
        min_q = np.min([data["targets"][i][np.arange(T), data["tokens"]] for i in range(2)], axis=0)
        weight = np.where(min_q >= data["v"], 0.7, 0.3)
        np.testing.assert_allclose(v_gradient, np.where(MASK, weight * (data["v"] - min_q), 0), atol=1e-10)


def test_masked_tokens_do_not_affect_losses_or_gradients(data):
    def evaluate(masked_value):
        filled = TokenStats(
            *(jnp.where(MASK, x, masked_value) for x in stats(data["heads"][:1], data["tokens"])[0][:2])
        )
        rewards, v = (np.where(MASK, data[name], masked_value) for name in ("rewards", "v"))
        return (
            q_learning.ilql_loss((filled, filled), v, (filled, filled), rewards, MASK),
            q_learning.mc_returns_loss(filled, rewards, MASK),
            jax.grad(lambda x: q_learning.soft_q_loss(filled._replace(logp=x), v, rewards, MASK))(filled.logp),
        )

    chex.assert_trees_all_equal(evaluate(np.nan), evaluate(0.0))


def test_memory_is_linear_in_tokens():
    ones = TokenStats(jnp.ones(512), jnp.ones(512))
    jaxpr = jax.make_jaxpr(jax.grad(lambda v: q_learning.ilql_loss((ones, ones), v, (ones, ones), v, v > 0)))(ones.lse)
    assert max(variable.aval.size for equation in jaxpr.eqns for variable in equation.outvars) <= 2 * 512


def test_loss_without_actions_is_zero():
    ones, no_actions = TokenStats(jnp.ones(4), jnp.ones(4)), jnp.zeros(4, bool)
    assert q_learning.mc_returns_loss(ones, jnp.ones(4), no_actions) == 0
    assert q_learning.cql_loss((ones, ones), (ones, ones), jnp.ones(4), no_actions) == 0


@pytest.mark.parametrize(
    "change, message",
    [
        ({"gamma": 0.0}, "gamma is 0.0"),
        ({"tau": 1.0}, "tau is 1.0"),
        ({"v": np.ones(3)}, r"v has shape \(3,\)"),
        ({"rewards": np.ones(5)}, r"rewards has shape \(5,\)"),
    ],
)
def test_invalid_arguments_are_rejected(change, message):
    ones = TokenStats(np.ones(4), np.ones(4))
    arguments = {"q": (ones, ones), "v": np.ones(4), "target_q": (ones, ones), "rewards": np.ones(4)} | change
    with pytest.raises(ValueError, match=message):
        q_learning.ilql_loss(**arguments, action_mask=np.ones(4, bool))
