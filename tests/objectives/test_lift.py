"""`lift`: inputs by name, options, required fields and heads, values, weights and metrics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import ArrayLike

from shiq_jax.objectives import (
    ACTIONS,
    DIFFERENCES,
    GROUPS,
    LABELLED,
    PAIRS,
    SEQUENCES,
    Example,
    Option,
    TokenStats,
    lift,
)

MASK = np.array([[0, 1, 1, 0], [1, 1, 1, 0]], bool)
RANDOM = np.random.default_rng(0)


def random_floats():
    return RANDOM.normal(size=MASK.shape).astype(np.float32)


def random_stats():
    return TokenStats(random_floats(), random_floats())


EXAMPLE = Example(
    policy=random_stats()._replace(lse2=random_floats()), references={"reference": random_stats()}, action_mask=MASK,
    rewards=random_floats(), values={"value": random_floats(), "q1": random_stats()}, labels=np.array([True, False]),
)  # fmt: skip
LOGRATIOS = np.where(MASK, EXAMPLE.policy.logp - EXAMPLE.references["reference"].logp, 0).sum(1)


def power_loss(chosen_logratio, rejected_logratio, *, beta: ArrayLike, power: ArrayLike = 2.0):
    """(beta d)^power.

    Args:
      power: the exponent.
    """
    return (beta * (chosen_logratio - rejected_logratio)) ** power


def test_pair_loss():
    objective = lift(power_loss, PAIRS)
    assert (objective.unit, objective.needs, objective.trains_policy) == ("pair", {"references"}, True)
    assert objective.name == "power" and dict(objective.heads) == {}
    loss_options = {"beta": Option(float, 0.1), "power": Option(float, 2.0, "the exponent.")}
    assert dict(list(objective.options.items())[:2]) == loss_options
    assert set(objective.options) == {*loss_options, "rpo_alpha", "ld_alpha", "use_weighting"}
    assert {"f_divergence", "f_alpha"} <= set(lift(power_loss, DIFFERENCES).options)
    out = jax.jit(objective.configure(beta=0.5, power=4.0).loss)(EXAMPLE)
    np.testing.assert_allclose(out.value, (0.5 * (LOGRATIOS[0] - LOGRATIOS[1])) ** 4, rtol=1e-5)
    assert out.weight == 1 and out.metrics["rewards/chosen"] == np.float32(0.5 * np.float32(LOGRATIOS[0]))


def test_sequence_loss_is_mapped_over_sequences():
    def spread_loss(v, rewards, action_mask, bootstrap, *, power: ArrayLike = 2.0):
        assert v.shape == rewards.shape == action_mask.shape == (4,) and bootstrap is None
        return jnp.sum(jnp.where(action_mask, jnp.abs(v - rewards), 0) ** power)

    expected = (np.abs(EXAMPLE.values["value"] - EXAMPLE.rewards) ** 2)[MASK].sum()
    for view, weight in ((SEQUENCES, 2), (ACTIONS, 5)):
        objective = lift(spread_loss, view)
        assert objective.needs == {"rewards"} and dict(objective.heads) == {"value": "value"}
        assert not objective.trains_policy and set(objective.options) == {"power", "beta"}
        out = objective.loss(EXAMPLE)
        np.testing.assert_allclose(out.value, expected, rtol=1e-5)
        assert (out.weight, out.metrics) == (weight, {})


def test_group_loss_takes_the_whole_group():
    def share_loss(logratios, real, *, beta: ArrayLike):
        return jnp.where(real, logratios / jnp.sum(logratios), 0) * beta

    objective = lift(share_loss, GROUPS, metrics=lambda inputs: {"sums": inputs["logratios"]})
    out = objective.loss(EXAMPLE)
    np.testing.assert_allclose((out.value, out.metrics["sums"]), (0.1, LOGRATIOS.sum()), rtol=1e-5)
    assert objective.needs == {"references"} and out.weight == 2


def test_aux_metrics_skip_empty_sequences():
    def aux_loss(logratio, desirable, *, beta: ArrayLike):
        return logratio + 1, {"sign": jnp.where(desirable, 1.0, -1.0)}

    objective = lift(aux_loss, LABELLED, has_aux=True)
    assert objective.needs == {"references", "labels"}
    out = objective.loss(EXAMPLE)
    np.testing.assert_allclose(out.value, LOGRATIOS.sum() + 2, rtol=1e-5)
    assert out.metrics == {"sign": 0.0}
    mask = MASK.copy()
    mask[1] = False
    out = objective.loss(EXAMPLE._replace(action_mask=mask))
    np.testing.assert_allclose((out.value, out.weight, out.metrics["sign"]), (LOGRATIOS[0] + 1, 1, 1), rtol=1e-5)


def test_input_names_map_parameters_to_inputs():
    def head_loss(q, *, scale: ArrayLike = 1.0):
        return scale * jnp.sum(q.logp)

    objective = lift(head_loss, SEQUENCES, input_names={"q": "q1"})
    assert dict(objective.heads) == {"q1": "q"} and objective.target_heads == ()
    np.testing.assert_allclose(objective.loss(EXAMPLE).value, EXAMPLE.values["q1"].logp.sum(), rtol=1e-5)
    assert lift(lambda target_q: 0.0, SEQUENCES).target_heads == ("q1", "q2")


def test_unknown_inputs_and_missing_defaults_are_rejected():
    with pytest.raises(ValueError, match="parameter 'logits' of <lambda> names no input; inputs are chosen_logratio, "):
        lift(lambda chosen_logratio, logits: 0.0, PAIRS)
    with pytest.raises(ValueError, match="option 'scale' of <lambda> has no default; add one"):
        lift(lambda chosen_logratio, *, scale: 0.0, PAIRS)
    assert lift(lambda chosen_logratio, *, scale: 0.0, PAIRS, defaults={"scale": 2.0}).options["scale"].default == 2.0
