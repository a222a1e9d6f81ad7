"""Objectives on examples: what they sum, what they weigh, what they report, and how the sums make a batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shiq_jax.objectives import OBJECTIVES, Example, LossOut, TokenStats, bellman_residuals, dpo_loss, shiq_loss

SEQUENCES = {"trajectory": 1, "pair": 2, "group": 4}
ALONE = sorted(name for name, objective in OBJECTIVES.items() if objective.couple is None)


def example(seed, sequences, length=6, actions=None, objective=None) -> Example:
    """Sequences with random numbers wherever the objective, if it is given, may look."""
    random = np.random.default_rng(seed)
    shape = (sequences, length)
    mask = random.random(shape) < 0.6
    mask[:, 0] = True
    if actions is not None:
        mask = np.arange(length) < np.asarray(actions)[:, None]
    draw = lambda *lead: random.normal(size=(*lead, *shape)).astype(np.float32)  # noqa: E731
    policy, reference, rewards = TokenStats(*draw(2)), TokenStats(*draw(2)), draw()
    heads, slow = ({}, ()) if objective is None else (objective.heads, objective.target_heads)
    values = {name: draw() if kind == "value" else TokenStats(*draw(2)) for name, kind in heads.items()}
    values |= {f"target_{name}": TokenStats(*draw(2)) for name in slow}
    return Example(
        policy=policy, references={"reference": reference}, action_mask=mask, rewards=rewards, values=values or None,
        labels=random.random(sequences) < 0.5,
    )  # fmt: skip


@pytest.mark.parametrize("name", ALONE)
def test_reads_no_more_than_it_declares(name):
    """An example with the declared fields alone is enough, and each of them is needed."""
    objective = OBJECTIVES[name]
    full = example(1, SEQUENCES[objective.unit], objective=objective)
    read = {"action_mask", *objective.needs} | ({"policy"} if objective.policy else set())
    read |= {"values"} if objective.heads else set()
    bare = Example(**{field: getattr(full, field) for field in read})
    assert objective.loss(bare).weight > 0
    for field in read:
        with pytest.raises(ValueError, match=f"Example.{field} is None"):
            objective.loss(bare._replace(**{field: None}))


@pytest.mark.parametrize("name", [name for name in ALONE if "references" in OBJECTIVES[name].needs])
def test_names_the_reference_that_is_missing(name):
    objective = OBJECTIVES[name]
    full = example(1, SEQUENCES[objective.unit], objective=objective)
    with pytest.raises(ValueError, match="'reference', but Example.references has 'previous'"):
        objective.loss(full._replace(references={"previous": full.policy}))


def test_shiq_is_the_plain_loss():
    one = example(2, 1)
    rows = jax.tree.map(lambda x: x[0], one)
    for options in ({}, {"beta": 0.3, "gamma": 0.9, "normalisation": "mean_t", "position_weight": "inv_position"}):
        out = jax.jit(OBJECTIVES["shiq"].configure(**options).loss)(one)
        arguments = (rows.policy, rows.references["reference"], rows.rewards, rows.action_mask)
        np.testing.assert_allclose(out.value, shiq_loss(*arguments, **({"beta": 0.1} | options)), rtol=1e-6)
        assert out.weight == 1


def test_shiq_ablations_and_bootstrap_reach_the_residuals():
    one = example(3, 1)._replace(bootstrap=np.array([0.7], np.float32))
    rows = jax.tree.map(lambda x: x[0], one)
    for options in (
        {"horizon": "one", "value": "lse"},
        {"horizon": "n_step", "n": 2},
        {"horizon": "trajectory"},
        {"gradient": "semi"},
    ):

        def plain(policy):
            residuals = bellman_residuals(
                policy, rows.references["reference"], rows.rewards, rows.action_mask, beta=0.2, bootstrap=0.7, **options
            )
            return jnp.sum(residuals**2)

        def registered(policy):
            stacked = jax.tree.map(lambda x: x[None], policy)
            return OBJECTIVES["shiq"].configure(beta=0.2, **options).loss(one._replace(policy=stacked)).value

        found, expected = (jax.jit(jax.value_and_grad(f))(rows.policy) for f in (registered, plain))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, expected)


def test_shiq_metrics():
    one = example(4, 1)
    metrics = OBJECTIVES["shiq"].configure(beta=0.2).loss(one).metrics
    policy, reference, rewards, mask = one.policy, one.references["reference"], one.rewards, one.action_mask
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


def test_dpo_is_the_plain_loss_of_summed_logratios():
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


def test_dpo_half_empty_pair_counts_for_nothing():
    out = OBJECTIVES["dpo"].loss(example(6, 2, actions=[3, 0]))
    assert not any(np.asarray(x).any() for x in jax.tree.leaves(out))


def test_dpo_refuses_what_is_no_pair():
    with pytest.raises(ValueError, match=r"action_mask has shape \(3, 6\) but dpo takes pairs"):
        OBJECTIVES["dpo"].loss(example(7, 3))


def test_sft_counts_tokens():
    one = example(8, 1)
    out = OBJECTIVES["sft"].loss(one)
    logp = one.policy.logp[one.action_mask]
    np.testing.assert_allclose((out.value, out.weight), (-logp.sum(), len(logp)), rtol=1e-6)
    np.testing.assert_allclose(out.metrics["probability"], np.exp(logp).sum(), rtol=1e-6)


def test_token_mean_does_not_depend_on_the_split():
    """Sums over global weights: the mean over a batch is not a mean of means."""
    lengths = ([5], [1], [3])
    outs = [OBJECTIVES["sft"].loss(example(9 + i, 1, actions=a)) for i, a in enumerate(lengths)]
    total = LossOut(*jax.tree.map(lambda *x: sum(x), *[(o.value, o.weight, o.metrics) for o in outs]))
    assert total.weight == 9
    means = np.mean([o.value / o.weight for o in outs])
    assert abs(total.value / total.weight - means) > 1e-3


def test_shiq_takes_only_values_read_from_logits():
    with pytest.raises(ValueError, match="value is 'given' but must be one of 'lse_shift', 'lse'"):
        OBJECTIVES["shiq"].configure(value="given").loss(example(10, 1))


def test_every_objective_is_documented():
    from pathlib import Path

    page = (Path(__file__).parents[2] / "docs" / "losses.md").read_text()
    missing = [name for name in OBJECTIVES if f"`{name}`" not in page and f"`{name}_loss(" not in page]
    assert not missing
