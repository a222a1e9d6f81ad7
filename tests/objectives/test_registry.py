"""Registered objectives on examples: values, weights, metrics and required fields."""

from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shiq_jax.objectives import OBJECTIVES, Example, LossOut, TokenStats, bellman_residuals, dpo_loss, shiq_loss

GROUP_SIZES = {"trajectory": 1, "pair": 2, "group": 4}
UNCOUPLED = sorted(name for name, objective in OBJECTIVES.items() if objective.couple is None)


def example(seed, sequences, length=6, actions=None, objective=None) -> Example:
    """Random example with the heads that the objective reads."""
    random = np.random.default_rng(seed)
    shape = (sequences, length)
    mask = random.random(shape) < 0.6
    mask[:, 0] = True
    if actions is not None:
        mask = np.arange(length) < np.asarray(actions)[:, None]
    floats = lambda *lead: random.normal(size=(*lead, *shape)).astype(np.float32)  # noqa: E731
    policy, reference, rewards = TokenStats(*floats(2)), TokenStats(*floats(2)), floats()
    heads, target_heads = ({}, ()) if objective is None else (objective.heads, objective.target_heads)
    values = {name: floats() if kind == "value" else TokenStats(*floats(2)) for name, kind in heads.items()}
    values |= {f"target_{name}": TokenStats(*floats(2)) for name in target_heads}
    return Example(
        policy=policy, references={"reference": reference}, action_mask=mask, rewards=rewards, values=values or None,
        labels=random.random(sequences) < 0.5,
    )  # fmt: skip


@pytest.mark.parametrize("name", UNCOUPLED)
def test_needs_are_necessary_and_sufficient(name):
    """The declared fields are sufficient, and each of them is necessary."""
    objective = OBJECTIVES[name]
    full = example(1, GROUP_SIZES[objective.unit], objective=objective)
    fields = {"action_mask", *objective.needs} | ({"policy"} if objective.trains_policy else set())
    fields |= {"values"} if objective.heads else set()
    minimal = Example(**{field: getattr(full, field) for field in fields})
    assert objective.loss(minimal).weight > 0
    for field in fields:
        with pytest.raises(ValueError, match=f"Example.{field} is None"):
            objective.loss(minimal._replace(**{field: None}))


@pytest.mark.parametrize("name", [name for name in UNCOUPLED if "references" in OBJECTIVES[name].needs])
def test_missing_reference_is_rejected(name):
    objective = OBJECTIVES[name]
    full = example(1, GROUP_SIZES[objective.unit], objective=objective)
    with pytest.raises(ValueError, match="'reference', but Example.references has 'previous'"):
        objective.loss(full._replace(references={"previous": full.policy}))


def test_shiq_objective_matches_the_plain_loss():
    trajectory = example(2, 1)
    sequence = jax.tree.map(lambda x: x[0], trajectory)
    for options in ({}, {"beta": 0.3, "gamma": 0.9, "normalisation": "mean_t", "position_weight": "inv_position"}):
        out = jax.jit(OBJECTIVES["shiq"].configure(**options).loss)(trajectory)
        arguments = (sequence.policy, sequence.references["reference"], sequence.rewards, sequence.action_mask)
        np.testing.assert_allclose(out.value, shiq_loss(*arguments, **({"beta": 0.1} | options)), rtol=1e-6)
        assert out.weight == 1


def test_shiq_options_and_bootstrap_match_bellman_residuals():
    trajectory = example(3, 1)._replace(bootstrap=np.array([0.7], np.float32))
    sequence = jax.tree.map(lambda x: x[0], trajectory)
    for options in (
        {"horizon": "one", "value": "lse"},
        {"horizon": "n_step", "n": 2},
        {"horizon": "trajectory"},
        {"gradient": "semi"},
    ):

        def plain_loss(policy):
            residuals = bellman_residuals(
                policy,
                sequence.references["reference"],
                sequence.rewards,
                sequence.action_mask,
                beta=0.2,
                bootstrap=0.7,
                **options,
            )
            return jnp.sum(residuals**2)

        def objective_loss(policy):
            stacked = jax.tree.map(lambda x: x[None], policy)
            return OBJECTIVES["shiq"].configure(beta=0.2, **options).loss(trajectory._replace(policy=stacked)).value

        actual, expected = (jax.jit(jax.value_and_grad(f))(sequence.policy) for f in (objective_loss, plain_loss))
        chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_shiq_metrics():
    trajectory = example(4, 1)
    metrics = OBJECTIVES["shiq"].configure(beta=0.2).loss(trajectory).metrics
    policy, reference = trajectory.policy, trajectory.references["reference"]
    rewards, mask = trajectory.rewards, trajectory.action_mask
    residuals = bellman_residuals(
        *(jax.tree.map(lambda x: x[0], x) for x in (policy, reference, rewards, mask)), beta=0.2
    )
    expected = {
        "residual_abs": np.abs(residuals)[mask[0]].mean(),
        "value": 0.2 * (policy.lse - reference.lse)[0, 0],
        "logratio": (policy.logp - reference.logp)[mask].sum(),
        "return": rewards[mask].sum(),
        "lse_abs": np.abs(policy.lse[mask]).mean(),
    }
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)


def test_dpo_objective_matches_the_plain_loss():
    pair = example(5, 2)
    out = OBJECTIVES["dpo"].configure(beta=0.3, label_smoothing=0.1).loss(pair)
    logratios = pair.policy.logp - pair.references["reference"].logp
    chosen, rejected = np.where(pair.action_mask, logratios, 0).sum(1)
    np.testing.assert_allclose(out.value, dpo_loss(chosen, rejected, beta=0.3, label_smoothing=0.1), rtol=1e-5)
    assert out.weight == 1
    expected = {
        "rewards/chosen": 0.3 * chosen,
        "rewards/rejected": 0.3 * rejected,
        "rewards/margins": 0.3 * (chosen - rejected),
        "rewards/accuracies": float(chosen > rejected),
    }
    assert out.metrics.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(out.metrics[name], value, rtol=1e-5, err_msg=name)


def test_dpo_ignores_pairs_with_an_empty_completion():
    out = OBJECTIVES["dpo"].loss(example(6, 2, actions=[3, 0]))
    assert not any(np.asarray(x).any() for x in jax.tree.leaves(out))


def test_dpo_rejects_groups():
    with pytest.raises(ValueError, match=r"action_mask has shape \(3, 6\) but dpo takes pairs"):
        OBJECTIVES["dpo"].loss(example(7, 3))


def test_sft_weight_is_the_number_of_tokens():
    trajectory = example(8, 1)
    out = OBJECTIVES["sft"].loss(trajectory)
    logp = trajectory.policy.logp[trajectory.action_mask]
    np.testing.assert_allclose((out.value, out.weight), (-logp.sum(), len(logp)), rtol=1e-6)
    np.testing.assert_allclose(out.metrics["probability"], np.exp(logp).sum(), rtol=1e-6)


def test_token_mean_is_not_a_mean_of_means():
    lengths = ([5], [1], [3])
    outs = [OBJECTIVES["sft"].loss(example(9 + i, 1, actions=length)) for i, length in enumerate(lengths)]
    total = LossOut(*jax.tree.map(lambda *x: sum(x), *[(o.value, o.weight, o.metrics) for o in outs]))
    assert total.weight == 9
    mean_of_means = np.mean([o.value / o.weight for o in outs])
    assert abs(total.value / total.weight - mean_of_means) > 1e-3


def test_shiq_rejects_given_values():
    with pytest.raises(ValueError, match="value is 'given' but must be one of 'lse_shift', 'lse'"):
        OBJECTIVES["shiq"].configure(value="given").loss(example(10, 1))


def test_every_objective_is_documented():
    page = (Path(__file__).parents[2] / "docs" / "losses.md").read_text()
    missing = [name for name in OBJECTIVES if f"`{name}`" not in page and f"`{name}_loss(" not in page]
    assert not missing
