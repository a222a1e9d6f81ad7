"""Losses with a learned value against loops over actions and the published forms; what each square trains."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shiq_jax.objectives import OBJECTIVES, Example, TokenStats, ilql_loss, learned_values

T = 9
MASK = np.array([0, 1, 1, 0, 0, 1, 1, 1, 0], bool)
ACTIONS = np.flatnonzero(MASK)
BETA = 0.4


@pytest.fixture
def data(x64):
    random = np.random.default_rng(0)
    stats = lambda: TokenStats(*(jnp.asarray(random.normal(size=T)) for _ in range(2)))  # noqa: E731
    return {"policy": stats(), "reference": stats(), "v": jnp.asarray(random.normal(size=T)),
            "rewards": jnp.asarray(random.normal(size=T))}  # fmt: skip


def soft_rewards(data, logp, reference=True):
    lr = logp - data["reference"].logp if reference else logp
    return data["rewards"] - BETA * lr


def squares(data, logp, v):
    """(sum of what follows - v)^2 of every action."""
    x = soft_rewards(data, logp)
    return jnp.stack([(sum(x[k] for k in ACTIONS if k >= t) - v[t]) ** 2 for t in ACTIONS])


def gradients(loss, data):
    """With respect to log-probabilities and values."""
    policy = data["policy"]
    return jax.grad(lambda logp, v: loss(policy._replace(logp=logp), v), argnums=(0, 1))(policy.logp, data["v"])


def test_oreo_trains_head_and_policy_each_by_the_mean_square(data):
    loss = lambda policy, v: learned_values.oreo_loss(policy, data["reference"], v, data["rewards"], MASK, beta=BETA)  # noqa: E731
    mean = lambda policy, v: jnp.mean(squares(data, policy.logp, v))  # noqa: E731
    np.testing.assert_allclose(loss(data["policy"], data["v"]), 2 * mean(data["policy"], data["v"]), atol=1e-12)
    for found, expected in zip(gradients(loss, data), gradients(mean, data)):
        np.testing.assert_allclose(found, expected, atol=1e-12)


def test_oreo_in_semi_lets_an_action_learn_from_its_own_square(data):
    loss = lambda policy, v: learned_values.oreo_loss(
        policy, data["reference"], v, data["rewards"], MASK, beta=BETA, gradient="semi"
    )  # noqa: E731
    found, of_v = gradients(loss, data)
    x = soft_rewards(data, data["policy"].logp)
    rho = np.zeros(T)
    rho[ACTIONS] = [sum(x[k] for k in ACTIONS if k >= t) - data["v"][t] for t in ACTIONS]
    np.testing.assert_allclose(found, -2 * BETA * rho / len(ACTIONS), atol=1e-12)
    np.testing.assert_allclose(of_v, -2 * rho / len(ACTIONS), atol=1e-12)


@pytest.mark.parametrize("n", [1, 2, 30])
def test_paths_are_consistent_over_n_actions(data, n):
    x, total = soft_rewards(data, data["policy"].logp, reference=False), 0.0
    for place in range(len(ACTIONS)):
        path = ACTIONS[place : place + n]
        beyond = ACTIONS[place + n] if place + n < len(ACTIONS) else None
        gain = sum(0.9**k * x[t] for k, t in enumerate(path))
        gain += 0.9**n * data["v"][beyond] if beyond is not None else 0.0
        total += (gain - data["v"][ACTIONS[place]]) ** 2
    found = learned_values.pcl_loss(data["policy"], data["v"], data["rewards"], MASK, beta=BETA, gamma=0.9, n=n)
    np.testing.assert_allclose(found, total, atol=1e-10)


def test_dro_has_the_gradients_of_its_published_losses(data):
    first = ACTIONS[0]

    def published(policy, v):
        lr = jnp.sum(jnp.where(MASK, policy.logp - data["reference"].logp, 0))
        gain = jnp.sum(jnp.where(MASK, data["rewards"], 0))
        fixed = jax.lax.stop_gradient
        of_policy = -(lr * (gain - fixed(v[first])) - BETA / 2 * lr**2)
        return of_policy + fixed(v[first] - gain + BETA * lr) * v[first]

    loss = lambda policy, v: learned_values.dro_loss(policy, data["reference"], v, data["rewards"], MASK, beta=BETA)  # noqa: E731
    for found, expected in zip(gradients(loss, data), gradients(published, data)):
        np.testing.assert_allclose(found, expected, atol=1e-12)


def test_true_values_leave_nothing(data):
    """Values that are what follows make every square vanish, whatever the policy."""
    x = soft_rewards(data, data["policy"].logp)
    v = jnp.asarray([sum(x[k] for k in ACTIONS if k >= t) for t in range(T)])
    given = data["policy"], data["reference"], v, data["rewards"], MASK
    assert learned_values.oreo_loss(*given, beta=BETA) < 1e-20
    assert learned_values.dro_loss(*given, beta=BETA) < 1e-20


def example(data, garbage=0.0):
    """Two sequences, the second empty; what stands off the actions may be anything."""
    fill = lambda x: jnp.stack([jnp.where(MASK, x, garbage), jnp.full(T, garbage)])  # noqa: E731
    stats = lambda each: TokenStats(fill(each.logp), fill(each.lse))  # noqa: E731
    q = {name: stats(data[other]) for name, other in (("q1", "policy"), ("q2", "reference"))}
    slow = {f"target_{name}": TokenStats(each.logp - 1, each.lse) for name, each in q.items()}
    return Example(
        policy=stats(data["policy"]), references={"reference": stats(data["reference"])},
        action_mask=jnp.stack([jnp.asarray(MASK), jnp.zeros(T, bool)]), rewards=fill(data["rewards"]),
        values={"value": fill(data["v"]), **q, **slow},
    )  # fmt: skip


@pytest.mark.parametrize("name", ["oreo", "pcl", "dro", "ilql", "cql", "mc_returns"])
def test_an_objective_adds_up_its_sequences_and_reads_actions_only(data, name):
    loss = OBJECTIVES[name].loss
    out = loss(example(data))
    assert out.weight == (1 if OBJECTIVES[name].policy else len(ACTIONS)) and out.value > 0
    other, gradient = jax.value_and_grad(lambda given: loss(given).value, allow_int=True)(example(data, np.nan))
    np.testing.assert_allclose(other, out.value, rtol=1e-12)
    leaves = [leaf for leaf in jax.tree.leaves(gradient) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert all(np.isfinite(leaf).all() for leaf in leaves)


def test_ilql_of_an_example_is_that_of_its_sequence(data):
    given = example(data)
    first = jax.tree.map(lambda leaf: leaf[0], given.values)
    expected = ilql_loss(
        (first["q1"], first["q2"]), first["value"], (first["target_q1"], first["target_q2"]), given.rewards[0], MASK,
        gamma=0.9, tau=0.8, alpha=0.3,
    )  # fmt: skip
    out = OBJECTIVES["ilql"].configure(gamma=0.9, tau=0.8, alpha=0.3).loss(given)
    np.testing.assert_allclose(out.value, expected, rtol=1e-12)
    np.testing.assert_allclose(out.metrics["value"], jnp.sum(jnp.where(MASK, data["v"], 0)), rtol=1e-12)


def test_without_what_heads_say_there_is_one_sentence(data):
    with pytest.raises(ValueError, match="Example.values is None but objective 'oreo' needs it"):
        OBJECTIVES["oreo"].loss(example(data)._replace(values=None))
