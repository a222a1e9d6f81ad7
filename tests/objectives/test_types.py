"""Objectives are immutable, and their options are bound by name."""

import jax
import pytest

from shiq_jax.objectives import OBJECTIVES, Example, LossOut, Objective


def loss(example, *, beta=1.0, gamma=2.0):
    return LossOut(example * beta, gamma, {})


OBJECTIVE = Objective(loss, frozenset({"rewards"}), "trajectory")


def test_configure_returns_a_bound_copy():
    bound = OBJECTIVE.configure(beta=3.0)
    assert bound.loss(5.0) == LossOut(15.0, 2.0, {})
    assert OBJECTIVE.loss(5.0).value == 5.0
    assert bound[1:] == OBJECTIVE[1:]


def test_repeated_configure_overrides_earlier_values():
    bound = OBJECTIVE.configure(beta=3.0).configure(gamma=7.0).configure(beta=4.0)
    assert bound.loss(5.0) == LossOut(20.0, 7.0, {})


def test_configure_rejects_unknown_options():
    with pytest.raises(ValueError, match="objective 'loss' has no option 'alpha'; its options are beta, gamma"):
        OBJECTIVE.configure(beta=1.0, alpha=2.0)
    with pytest.raises(ValueError, match="'loss' has no option 'example'; its options are beta, gamma"):
        OBJECTIVE.configure(beta=1.0).configure(example=0)
    with pytest.raises(ValueError, match="'sft' has no option 'beta'; its options are none"):
        OBJECTIVES["sft"].configure(beta=1.0)


def test_extra_stats_depend_on_the_bound_options():
    objective = OBJECTIVE._replace(optional_stats={"lse2": "gamma", "other": None})
    assert objective.extra_stats == ("other",)
    assert objective.configure(gamma=True).extra_stats == ("lse2", "other")
    assert objective.configure(gamma=True).configure(gamma=False, beta=2.0).extra_stats == ("other",)
    assert not any(objective.extra_stats for objective in OBJECTIVES.values())


def test_example_fields_default_to_none():
    assert jax.tree.leaves(Example()) == []
    assert set(Example._fields) >= {f for objective in OBJECTIVES.values() for f in objective.needs}


def test_registry_is_read_only():
    with pytest.raises(TypeError):
        OBJECTIVES["mine"] = OBJECTIVE
    assert {"shiq", "dpo", "sft"} <= set(OBJECTIVES)
