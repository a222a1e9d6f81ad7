"""Losses with a value head against loops over actions and the published losses, in value and gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shiq_jax.objectives import OBJECTIVES, Example, TokenStats, ilql_loss, learned_values, soft_q_loss

T = 9
MASK = np.array([0, 1, 1, 0, 0, 1, 1, 1, 0], bool)
ACTIONS = np.flatnonzero(MASK)
BETA = 0.4


@pytest.fixture
def data(x64):
    random = np.random.default_rng(0)
    random_stats = lambda: TokenStats(*(jnp.asarray(random.normal(size=T)) for _ in range(2)))  # noqa: E731
    return {"policy": random_stats(), "reference": random_stats(), "v": jnp.asarray(random.normal(size=T)),
            "rewards": jnp.asarray(random.normal(size=T))}  # fmt: skip


def soft_rewards(data, logp, reference=True):
    logratio = logp - data["reference"].logp if reference else logp
    return data["rewards"] - BETA * logratio


def squared_residuals(data, logp, v):
    """(return - v)^2 of every action."""
    x = soft_rewards(data, logp)
    return jnp.stack([(sum(x[k] for k in ACTIONS if k >= t) - v[t]) ** 2 for t in ACTIONS])


def gradients(loss, data):
    """Gradients with respect to log-probabilities and values."""
    policy = data["policy"]
    return jax.grad(lambda logp, v: loss(policy._replace(logp=logp), v), argnums=(0, 1))(policy.logp, data["v"])


def test_oreo_trains_head_and_policy_on_the_mean_square(data):
    def loss(policy, v):
        return learned_values.oreo_loss(policy, data["reference"], v, data["rewards"], MASK, beta=BETA)

    mean_square = lambda policy, v: jnp.mean(squared_residuals(data, policy.logp, v))  # noqa: E731
    np.testing.assert_allclose(loss(data["policy"], data["v"]), 2 * mean_square(data["policy"], data["v"]), atol=1e-12)
    for actual, expected in zip(gradients(loss, data), gradients(mean_square, data)):
        np.testing.assert_allclose(actual, expected, atol=1e-12)


def test_oreo_semi_gradient_of_an_action_is_that_of_its_own_square(data):
    loss = lambda policy, v: learned_values.oreo_loss(
        policy, data["reference"], v, data["rewards"], MASK, beta=BETA, gradient="semi"
    )  # noqa: E731
    policy_gradient, v_gradient = gradients(loss, data)
    x = soft_rewards(data, data["policy"].logp)
    residuals = np.zeros(T)
    residuals[ACTIONS] = [sum(x[k] for k in ACTIONS if k >= t) - data["v"][t] for t in ACTIONS]
    np.testing.assert_allclose(policy_gradient, -2 * BETA * residuals / len(ACTIONS), atol=1e-12)
    np.testing.assert_allclose(v_gradient, -2 * residuals / len(ACTIONS), atol=1e-12)


@pytest.mark.parametrize("n", [1, 2, 30])
def test_pcl_sums_squared_n_step_residuals(data, n):
    x, total = soft_rewards(data, data["policy"].logp, reference=False), 0.0
    for index in range(len(ACTIONS)):
        path = ACTIONS[index : index + n]
        cut = ACTIONS[index + n] if index + n < len(ACTIONS) else None
        target = sum(0.9**k * x[t] for k, t in enumerate(path))
        target += 0.9**n * data["v"][cut] if cut is not None else 0.0
        total += (target - data["v"][ACTIONS[index]]) ** 2
    loss = learned_values.pcl_loss(data["policy"], data["v"], data["rewards"], MASK, beta=BETA, gamma=0.9, n=n)
    np.testing.assert_allclose(loss, total, atol=1e-10)


def test_dro_gradients_match_the_published_losses(data):
    first = ACTIONS[0]

    def published(policy, v):
        logratio = jnp.sum(jnp.where(MASK, policy.logp - data["reference"].logp, 0))
        total_reward = jnp.sum(jnp.where(MASK, data["rewards"], 0))
        frozen = jax.lax.stop_gradient
        policy_loss = -(logratio * (total_reward - frozen(v[first])) - BETA / 2 * logratio**2)
        return policy_loss + frozen(v[first] - total_reward + BETA * logratio) * v[first]

    def loss(policy, v):
        return learned_values.dro_loss(policy, data["reference"], v, data["rewards"], MASK, beta=BETA)

    for actual, expected in zip(gradients(loss, data), gradients(published, data)):
        np.testing.assert_allclose(actual, expected, atol=1e-12)


def test_losses_vanish_at_the_true_values(data):
    """If the values equal the soft returns, all residuals are 0 for any policy."""
    x = soft_rewards(data, data["policy"].logp)
    v = jnp.asarray([sum(x[k] for k in ACTIONS if k >= t) for t in range(T)])
    arguments = data["policy"], data["reference"], v, data["rewards"], MASK
    assert learned_values.oreo_loss(*arguments, beta=BETA) < 1e-20
    assert learned_values.dro_loss(*arguments, beta=BETA) < 1e-20


def example(data, garbage=0.0):
    """Example of two sequences, the second empty; masked tokens hold `garbage`."""
    fill = lambda x: jnp.stack([jnp.where(MASK, x, garbage), jnp.full(T, garbage)])  # noqa: E731
    fill_stats = lambda stats: TokenStats(fill(stats.logp), fill(stats.lse))  # noqa: E731
    q = {name: fill_stats(data[key]) for name, key in (("q1", "policy"), ("q2", "reference"))}
    target_q = {f"target_{name}": TokenStats(stats.logp - 1, stats.lse) for name, stats in q.items()}
    return Example(
        policy=fill_stats(data["policy"]), references={"reference": fill_stats(data["reference"])},
        action_mask=jnp.stack([jnp.asarray(MASK), jnp.zeros(T, bool)]), rewards=fill(data["rewards"]),
        values={"value": fill(data["v"]), **q, **target_q},
    )  # fmt: skip


@pytest.mark.parametrize("name", ["oreo", "pcl", "dro", "ilql", "cql", "mc_returns", "soft_q"])
def test_objectives_sum_over_sequences_and_ignore_masked_tokens(data, name):
    loss = OBJECTIVES[name].loss
    out = loss(example(data))
    assert out.weight == (1 if OBJECTIVES[name].trains_policy else len(ACTIONS)) and out.value > 0
    value, gradient = jax.value_and_grad(lambda x: loss(x).value, allow_int=True)(example(data, np.nan))
    np.testing.assert_allclose(value, out.value, rtol=1e-12)
    leaves = [leaf for leaf in jax.tree.leaves(gradient) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert all(np.isfinite(leaf).all() for leaf in leaves)


def test_ilql_objective_matches_the_plain_loss(data):
    two_sequences = example(data)
    first = jax.tree.map(lambda leaf: leaf[0], two_sequences.values)
    expected = ilql_loss(
        (first["q1"], first["q2"]), first["value"], (first["target_q1"], first["target_q2"]),
        two_sequences.rewards[0], MASK, gamma=0.9, tau=0.8, alpha=0.3,
    )  # fmt: skip
    out = OBJECTIVES["ilql"].configure(gamma=0.9, tau=0.8, alpha=0.3).loss(two_sequences)
    np.testing.assert_allclose(out.value, expected, rtol=1e-12)
    np.testing.assert_allclose(out.metrics["value"], jnp.sum(jnp.where(MASK, data["v"], 0)), rtol=1e-12)


def test_soft_q_objective_bootstraps_from_the_target_head(data):
    two_sequences = example(data)
    first = jax.tree.map(lambda leaf: leaf[0], two_sequences.values)
    expected = soft_q_loss(first["q1"], first["target_q1"].lse, two_sequences.rewards[0], MASK, gamma=0.9, delta=0.5)
    objective = OBJECTIVES["soft_q"].configure(gamma=0.9, delta=0.5)
    np.testing.assert_allclose(objective.loss(two_sequences).value, expected, rtol=1e-12)
    assert (objective.heads, objective.target_heads, objective.needs) == ({"q1": "q"}, ("q1",), {"rewards"})


def test_missing_values_are_rejected(data):
    with pytest.raises(ValueError, match="Example.values is None but objective 'oreo' requires it"):
        OBJECTIVES["oreo"].loss(example(data)._replace(values=None))
