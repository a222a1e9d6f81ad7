"""Sequence-level regressions: identities, the common optimum, and their relation to Bellman residuals."""

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
    """Log-ratios, returns and mask of five answers; the fourth is padding and holds NaN."""
    random = np.random.default_rng(0)
    logratios, returns = random.normal(size=(2, 5))
    logratios[3] = returns[3] = np.nan
    return jnp.asarray(logratios), jnp.asarray(returns), jnp.arange(5) != 3


def without_padding(values):
    return np.delete(np.asarray(values), 3)


def test_vargrad_is_half_the_mean_squared_difference_of_pairs(group):
    residuals = without_padding(group[0]) - without_padding(group[1]) / BETA
    actual = regressions.vargrad_loss(*group, beta=BETA)
    assert actual[3] == 0
    pairs = (residuals[:, None] - residuals) ** 2
    np.testing.assert_allclose(actual.sum() / 4, pairs.sum() / (2 * 4**2), atol=1e-12)


def test_vargrad_gradient_does_not_depend_on_detaching_the_mean(group):
    def attached(logratios):
        residuals = jnp.delete(logratios, 3) - without_padding(group[1]) / BETA
        return jnp.sum((residuals - jnp.mean(residuals)) ** 2)

    actual = jax.grad(lambda x: regressions.vargrad_loss(x, *group[1:], beta=BETA).sum())(group[0])
    np.testing.assert_allclose(actual, jax.grad(attached)(group[0]), atol=1e-12)


def test_group_mean_adds_the_squared_mean_logratio(group):
    loss = regressions.group_mean_loss(*group, beta=BETA).sum() / 4
    residuals = without_padding(group[0]) - without_padding(group[1]) / BETA
    np.testing.assert_allclose(loss, residuals.var() + without_padding(group[0]).mean() ** 2, atol=1e-12)


def test_a_star_po_value_is_the_soft_mean_of_rewards(group):
    actual = regressions.a_star_po_loss(*group, beta=BETA, value_beta=0.3)
    value = 0.3 * np.log(np.mean(np.exp(without_padding(group[1]) / 0.3)))
    expected = (BETA * without_padding(group[0]) + value - without_padding(group[1])) ** 2
    np.testing.assert_allclose(without_padding(actual), expected, atol=1e-12)


def test_copg_gradient_is_that_of_the_squared_pair_residual(x64):
    arguments = np.random.default_rng(1).normal(size=4)

    def pair_residual(chosen_logratio, rejected_logratio, chosen_return, rejected_return):
        return (chosen_return - BETA * chosen_logratio) - (rejected_return - BETA * rejected_logratio)

    actual = jax.grad(lambda w, l: regressions.copg_loss(w, l, *arguments[2:], beta=BETA), (0, 1))(*arguments[:2])
    expected = jax.grad(lambda w, l: pair_residual(w, l, *arguments[2:]) ** 2 / (2 * BETA), (0, 1))(*arguments[:2])
    np.testing.assert_allclose(actual, expected, atol=1e-12)
    rebel = regressions.rebel_loss(*arguments, beta=BETA)
    np.testing.assert_allclose(rebel, pair_residual(*arguments) ** 2, atol=1e-12)


def test_value_cancels_in_pairs_of_trajectory_residuals(x64):
    """The values of two answers to one prompt cancel, with and without the shift."""
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
        actual = OBJECTIVES["rebel"].configure(beta=BETA).loss(pair).value
        np.testing.assert_allclose(actual, (first[0] - first[1]) ** 2, atol=1e-12)


@pytest.mark.parametrize(("name", "value"), [("reval", "lse_shift"), ("tbrm", "lse")])
def test_reval_and_tbrm_match_their_published_forms(name, value, x64):
    random = np.random.default_rng(3)
    policy, reference = (TokenStats(*random.normal(size=(2, 1, 6))) for _ in "pr")
    rewards, mask = random.normal(size=(1, 6)), np.array([[0, 1, 1, 0, 1, 1]], bool)
    actual = OBJECTIVES[name].configure(beta=BETA).loss(Example(policy, {"reference": reference}, mask, rewards)).value
    shift = reference.lse[0, 1] if name == "reval" else 0
    logratio = (policy.logp - reference.logp)[mask].sum()
    np.testing.assert_allclose(
        actual, (policy.lse[0, 1] - shift + logratio - rewards[mask].sum() / BETA) ** 2, atol=1e-12
    )


@pytest.mark.parametrize("name", ["vargrad", "copg", "rebel", "a_star_po"])
def test_gradient_vanishes_at_the_optimal_bandit_policy(name, x64):
    """The optimum is proportional to pi_ref exp(R / beta)."""
    random = np.random.default_rng(4)
    actions, beta = 6, 0.5
    reference, returns = np.log(random.dirichlet(np.ones(actions))), random.normal(size=actions)
    optimum = jax.nn.log_softmax(reference + returns / beta)
    # A large sample of the reference makes the offline value of A*-PO nearly exact.
    samples = random.choice(actions, 200_000, p=np.exp(reference))

    def loss(logits):
        logratios = jax.nn.log_softmax(logits) - reference
        if name in METHODS:
            answers = samples if name == "a_star_po" else np.arange(actions)
            options = {"value_beta": beta} if name == "a_star_po" else {}
            real = jnp.ones(len(answers), bool)
            return METHODS[name](logratios[answers], jnp.asarray(returns[answers]), real, beta=beta, **options).mean()
        i, j = np.triu_indices(actions, 1)
        pair_loss = getattr(regressions, f"{name}_loss")
        return pair_loss(logratios[i], logratios[j], returns[i], returns[j], beta=beta).mean()

    gradient = jax.grad(loss)(optimum)
    perturbed = jax.grad(loss)(optimum + random.normal(size=actions))
    tolerance = 5e-3 if name == "a_star_po" else 1e-10
    assert np.abs(gradient).max() < tolerance < 0.1 * np.abs(perturbed).max()


@pytest.mark.parametrize("name", METHODS)
def test_group_without_answers_has_zero_loss_and_gradient(name):
    loss = lambda x: METHODS[name](x, jnp.ones(3), jnp.zeros(3, bool), beta=BETA).sum()  # noqa: E731
    value, gradient = jax.value_and_grad(loss)(jnp.ones(3))
    assert value == 0 and not np.any(gradient)


def test_invalid_arguments_are_rejected():
    with pytest.raises(ValueError, match=r"logratios has shape \(3,\) but returns has shape \(2,\)"):
        regressions.vargrad_loss(np.zeros(3), np.zeros(2), np.ones(3), beta=0.1)
    with pytest.raises(ValueError, match="value_beta is 0"):
        regressions.a_star_po_loss(np.zeros(3), np.zeros(3), np.ones(3), beta=0.1, value_beta=0)
    with pytest.raises(ValueError, match="beta is -1"):
        regressions.copg_loss(0.0, 0.0, 0.0, 0.0, beta=-1)
