"""Q-learning losses against loops over actions, their gradients, and what masked tokens may hold."""

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
    """Rows of two Q heads and of their slow copies [T, V], values, rewards and tokens; a future for the cut."""
    random = np.random.default_rng(0)
    heads, targets = random.normal(size=(2, 2, T, V))
    return {
        "heads": heads, "targets": targets, "v": random.normal(size=T), "rewards": random.normal(size=T),
        "tokens": random.integers(0, V, T),
    }  # fmt: skip


def stats(rows, tokens):
    return tuple(token_stats_from_logits(jnp.asarray(row), tokens) for row in rows)


def entropies(data, heads):
    return sum(jax.nn.logsumexp(head[t]) - head[t, data["tokens"][t]] for head in heads for t in ACTIONS)


def following(t):
    later = ACTIONS[ACTIONS > t]
    return later[0] if len(later) else None


@pytest.mark.parametrize("bootstrap", [None, 0.8])
def test_ilql_is_its_formula(data, bootstrap):
    taken = lambda rows, t: rows[:, t, data["tokens"][t]]
    total = 0.0
    for t in ACTIONS:
        after = following(t)
        ahead = data["v"][after] if after is not None else bootstrap or 0.0
        q_hat, value = taken(data["targets"], t).min(), data["v"][t]
        weight = 0.8 if q_hat >= value else 1 - 0.8
        total += ((taken(data["heads"], t) - data["rewards"][t] - 0.9 * ahead) ** 2).sum() / 2
        total += weight * (value - q_hat) ** 2 / 2
    total += 0.3 * entropies(data, data["heads"])
    found = q_learning.ilql_loss(
        stats(data["heads"], data["tokens"]), data["v"], stats(data["targets"], data["tokens"]), data["rewards"], MASK,
        gamma=0.9, tau=0.8, alpha=0.3, bootstrap=bootstrap,
    )  # fmt: skip
    np.testing.assert_allclose(found, total, atol=1e-10)


@pytest.mark.parametrize("bootstrap", [None, 0.8])
def test_cql_is_its_formula(data, bootstrap):
    total = 0.3 * entropies(data, data["heads"])
    for t in ACTIONS:
        after = following(t)
        ahead = bootstrap or 0.0
        if after is not None:
            ahead = data["targets"][:, after, data["tokens"][after]].min()
        error = data["heads"][:, t, data["tokens"][t]] - data["rewards"][t] - 0.9 * ahead
        total += (error**2).sum() / 2
    found = q_learning.cql_loss(
        stats(data["heads"], data["tokens"]), stats(data["targets"], data["tokens"]), data["rewards"], MASK,
        gamma=0.9, alpha=0.3, bootstrap=bootstrap,
    )  # fmt: skip
    np.testing.assert_allclose(found, total, atol=1e-10)


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_monte_carlo_is_its_formula(data, gamma):
    total, gain = 0.3 * entropies(data, data["heads"][:1]), 0.8
    for t in ACTIONS[::-1]:
        gain = data["rewards"][t] + gamma * gain
        total += (data["heads"][0, t, data["tokens"][t]] - gain) ** 2 / 2
    (head,) = stats(data["heads"][:1], data["tokens"])
    found = q_learning.mc_returns_loss(head, data["rewards"], MASK, gamma=gamma, alpha=0.3, bootstrap=0.8)
    np.testing.assert_allclose(found, total, atol=1e-10)


def test_soft_q_is_its_formula(data):
    lse = np.asarray(jax.nn.logsumexp(data["targets"][0], axis=-1))
    total, kinds = 0.0, set()
    for t in ACTIONS:
        after = following(t)
        error = abs(
            data["rewards"][t] + (lse[after] if after is not None else 0) - data["heads"][0, t, data["tokens"][t]]
        )
        total += error**2 / 2 if error <= 1.5 else 1.5 * (error - 0.75)
        kinds.add(error <= 1.5)
    assert kinds == {True, False}
    (head,) = stats(data["heads"][:1], data["tokens"])
    np.testing.assert_allclose(q_learning.soft_q_loss(head, lse, data["rewards"], MASK, delta=1.5), total, atol=1e-10)


def losses(data):
    """Each loss as a function of (heads, v), all else fixed."""
    targets = stats(data["targets"], data["tokens"])
    rest = data["rewards"], MASK
    return {
        "ilql": lambda heads, v: q_learning.ilql_loss(stats(heads, data["tokens"]), v, targets, *rest),
        "cql": lambda heads, v: q_learning.cql_loss(stats(heads, data["tokens"]), targets, *rest),
        "mc": lambda heads, v: q_learning.mc_returns_loss(stats(heads, data["tokens"])[0], *rest),
        "soft": lambda heads, v: q_learning.soft_q_loss(stats(heads, data["tokens"])[0], targets[0].lse, *rest),
    }


def test_gradients_to_heads_are_slopes_and_v_learns_from_its_expectile_alone(data):
    for name, loss in losses(data).items():
        gradient, to_v = jax.jit(jax.grad(loss, (0, 1)))(data["heads"], data["v"])
        direction = np.random.default_rng(1).normal(size=data["heads"].shape)
        ends = [loss(data["heads"] + sign * 1e-6 * direction, data["v"]) for sign in (1, -1)]
        np.testing.assert_allclose((gradient * direction).sum(), (ends[0] - ends[1]) / 2e-6, rtol=1e-6, err_msg=name)
        assert not np.any(gradient[:, ~MASK])
        if name != "ilql":
            assert not np.any(to_v)
            continue
        smaller = np.min([data["targets"][i][np.arange(T), data["tokens"]] for i in range(2)], axis=0)
        weight = np.where(smaller >= data["v"], 0.7, 0.3)
        np.testing.assert_allclose(to_v, np.where(MASK, weight * (data["v"] - smaller), 0), atol=1e-10)


def test_what_masked_tokens_hold_does_not_matter(data):
    def with_(value):
        broken = TokenStats(*(jnp.where(MASK, x, value) for x in stats(data["heads"][:1], data["tokens"])[0][:2]))
        rewards, v = (np.where(MASK, data[name], value) for name in ("rewards", "v"))
        return (
            q_learning.ilql_loss((broken, broken), v, (broken, broken), rewards, MASK),
            q_learning.mc_returns_loss(broken, rewards, MASK),
            jax.grad(lambda x: q_learning.soft_q_loss(broken._replace(logp=x), v, rewards, MASK))(broken.logp),
        )

    for found, expected in zip(with_(np.nan), with_(0.0), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_the_largest_array_is_one_float_per_token():
    ones = TokenStats(jnp.ones(512), jnp.ones(512))
    program = jax.make_jaxpr(jax.grad(lambda v: q_learning.ilql_loss((ones, ones), v, (ones, ones), v, v > 0)))(
        ones.lse
    )
    assert max(variable.aval.size for equation in program.eqns for variable in equation.outvars) <= 2 * 512


def test_a_sequence_without_actions_is_nothing():
    ones, nothing = TokenStats(jnp.ones(4), jnp.ones(4)), jnp.zeros(4, bool)
    assert q_learning.mc_returns_loss(ones, jnp.ones(4), nothing) == 0
    assert q_learning.cql_loss((ones, ones), (ones, ones), jnp.ones(4), nothing) == 0


@pytest.mark.parametrize(
    "change, words",
    [
        ({"gamma": 0.0}, "gamma is 0.0"),
        ({"tau": 1.0}, "tau is 1.0"),
        ({"v": np.ones(3)}, r"v has shape \(3,\)"),
        ({"rewards": np.ones(5)}, r"rewards has shape \(5,\)"),
    ],
)
def test_bad_arguments_are_named(change, words):
    ones = TokenStats(np.ones(4), np.ones(4))
    arguments = {"q": (ones, ones), "v": np.ones(4), "target_q": (ones, ones), "rewards": np.ones(4)} | change
    with pytest.raises(ValueError, match=words):
        q_learning.ilql_loss(**arguments, action_mask=np.ones(4, bool))
