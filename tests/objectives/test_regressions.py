"""Regressions on rewards: their identities, their common optimum, and what they are in terms of residuals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shiq_jax.objectives import OBJECTIVES, Example, TokenStats, bellman_residuals, regressions

BETA = 0.7
METHODS = {
    "vargrad": regressions.vargrad_loss,
    "group_mean": regressions.group_mean_loss,
    "a_star_po": regressions.a_star_po_loss,
}


@pytest.fixture
def group(x64):
    """Log-ratios and returns of five answers, and which are there: all but the fourth, which holds nonsense."""
    random = np.random.default_rng(0)
    logratios, returns = random.normal(size=(2, 5))
    logratios[3] = returns[3] = np.nan
    return jnp.asarray(logratios), jnp.asarray(returns), jnp.arange(5) != 3


def kept(values):
    return np.delete(np.asarray(values), 3)


def test_vargrad_is_half_the_mean_squared_difference_of_all_pairs(group):
    gaps = kept(group[0]) - kept(group[1]) / BETA
    found = regressions.vargrad_loss(*group, beta=BETA)
    assert found[3] == 0
    pairs = (gaps[:, None] - gaps) ** 2
    np.testing.assert_allclose(found.sum() / 4, pairs.sum() / (2 * 4**2), atol=1e-12)


def test_detaching_the_mean_does_not_change_the_gradient(group):
    def attached(logratios):
        gaps = jnp.delete(logratios, 3) - kept(group[1]) / BETA
        return jnp.sum((gaps - jnp.mean(gaps)) ** 2)

    found = jax.grad(lambda x: regressions.vargrad_loss(x, *group[1:], beta=BETA).sum())(group[0])
    np.testing.assert_allclose(found, jax.grad(attached)(group[0]), atol=1e-12)


def test_the_mean_reward_adds_a_penalty_on_drift(group):
    ours = regressions.group_mean_loss(*group, beta=BETA).sum() / 4
    gaps = kept(group[0]) - kept(group[1]) / BETA
    np.testing.assert_allclose(ours, gaps.var() + kept(group[0]).mean() ** 2, atol=1e-12)


def test_the_offline_value_is_the_soft_mean_of_rewards(group):
    found = regressions.a_star_po_loss(*group, beta=BETA, value_beta=0.3)
    value = 0.3 * np.log(np.mean(np.exp(kept(group[1]) / 0.3)))
    expected = (BETA * kept(group[0]) + value - kept(group[1])) ** 2
    np.testing.assert_allclose(kept(found), expected, atol=1e-12)


def test_copg_descends_the_squared_residual_of_the_pair(x64):
    arguments = np.random.default_rng(1).normal(size=4)

    def residual(logratio, other, reward, other_reward):
        return (reward - BETA * logratio) - (other_reward - BETA * other)

    found = jax.grad(lambda w, l: regressions.copg_loss(w, l, *arguments[2:], beta=BETA), (0, 1))(*arguments[:2])
    square = jax.grad(lambda w, l: residual(w, l, *arguments[2:]) ** 2 / (2 * BETA), (0, 1))(*arguments[:2])
    np.testing.assert_allclose(found, square, atol=1e-12)
    rebel = regressions.rebel_loss(*arguments, beta=BETA)
    np.testing.assert_allclose(rebel, residual(*arguments) ** 2, atol=1e-12)


def test_pairs_of_trajectory_residuals_need_no_value(x64):
    """Of two answers to one prompt the values cancel, with the shift and without it."""
    random = np.random.default_rng(2)
    policy, reference = (TokenStats(*random.normal(size=(2, 2, 6))) for _ in "pr")
    policy.lse[1, 0], reference.lse[1, 0] = policy.lse[0, 0], reference.lse[0, 0]
    rewards, mask = random.normal(size=(2, 6)), np.ones(6, bool)
    pair = Example(policy, {"reference": reference}, np.stack([mask, mask]), rewards)
    for value in ("lse_shift", "lse"):
        first = [
            bellman_residuals(
                *jax.tree.map(lambda x: x[k], (policy, reference, rewards)), mask, beta=BETA, horizon="trajectory",
                value=value,
            )[0]
            for k in range(2)
        ]  # fmt: skip
        found = OBJECTIVES["rebel"].configure(beta=BETA).loss(pair).value
        np.testing.assert_allclose(found, (first[0] - first[1]) ** 2, atol=1e-12)


@pytest.mark.parametrize(("name", "value"), [("reval", "lse_shift"), ("tbrm", "lse")])
def test_published_forms_of_the_first_residual(name, value, x64):
    random = np.random.default_rng(3)
    policy, reference = (TokenStats(*random.normal(size=(2, 1, 6))) for _ in "pr")
    rewards, mask = random.normal(size=(1, 6)), np.array([[0, 1, 1, 0, 1, 1]], bool)
    found = OBJECTIVES[name].configure(beta=BETA).loss(Example(policy, {"reference": reference}, mask, rewards)).value
    shift = reference.lse[0, 1] if name == "reval" else 0
    logratio = (policy.logp - reference.logp)[mask].sum()
    np.testing.assert_allclose(
        found, (policy.lse[0, 1] - shift + logratio - rewards[mask].sum() / BETA) ** 2, atol=1e-12
    )


@pytest.mark.parametrize("name", ["vargrad", "copg", "rebel", "a_star_po"])
def test_the_optimal_policy_of_a_bandit_is_a_minimum(name, x64):
    """The policy proportional to pi_ref exp(R / beta) leaves nothing to regress, and any other does."""
    random = np.random.default_rng(4)
    actions, beta = 6, 0.5
    reference, returns = np.log(random.dirichlet(np.ones(actions))), random.normal(size=actions)
    best = jax.nn.log_softmax(reference + returns / beta)
    # Every answer of the reference in its right proportion makes the offline value exact.
    copies = random.choice(actions, 200_000, p=np.exp(reference))

    def loss(logits):
        logratios = jax.nn.log_softmax(logits) - reference
        if name in METHODS:
            drawn, real = copies if name == "a_star_po" else np.arange(actions), True
            options = {"value_beta": beta} if name == "a_star_po" else {}
            ones = jnp.full(len(drawn), real)
            return METHODS[name](logratios[drawn], jnp.asarray(returns[drawn]), ones, beta=beta, **options).mean()
        i, j = np.triu_indices(actions, 1)
        plain = getattr(regressions, f"{name}_loss")
        return plain(logratios[i], logratios[j], returns[i], returns[j], beta=beta).mean()

    gradient = jax.grad(loss)(best)
    elsewhere = jax.grad(loss)(best + random.normal(size=actions))
    limit = 5e-3 if name == "a_star_po" else 1e-10
    assert np.abs(gradient).max() < limit < 0.1 * np.abs(elsewhere).max()


@pytest.mark.parametrize("name", METHODS)
def test_a_group_without_answers_is_nothing(name):
    found = jax.value_and_grad(lambda x: METHODS[name](x, jnp.ones(3), jnp.zeros(3, bool), beta=BETA).sum())(
        jnp.ones(3)
    )
    assert found[0] == 0 and not np.any(found[1])


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"logratios has shape \(3,\) but returns has shape \(2,\)"):
        regressions.vargrad_loss(np.zeros(3), np.zeros(2), np.ones(3), beta=0.1)
    with pytest.raises(ValueError, match="value_beta is 0"):
        regressions.a_star_po_loss(np.zeros(3), np.zeros(3), np.ones(3), beta=0.1, value_beta=0)
    with pytest.raises(ValueError, match="beta is -1"):
        regressions.copg_loss(0.0, 0.0, 0.0, 0.0, beta=-1)
