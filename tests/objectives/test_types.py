"""What an objective is: an immutable description whose options are checked by name."""

import jax
import pytest

from shiq_jax.objectives import OBJECTIVES, Example, LossOut, Objective


def loss(example, *, beta=1.0, gamma=2.0):
    return LossOut(example * beta, gamma, {})


OBJECTIVE = Objective(loss, frozenset({"rewards"}), "trajectory")


def test_configure_binds_options_and_leaves_the_original():
    bound = OBJECTIVE.configure(beta=3.0)
    assert bound.loss(5.0) == LossOut(15.0, 2.0, {})
    assert OBJECTIVE.loss(5.0).value == 5.0
    assert bound[1:] == OBJECTIVE[1:]


def test_configure_may_be_repeated_and_the_last_word_stands():
    bound = OBJECTIVE.configure(beta=3.0).configure(gamma=7.0).configure(beta=4.0)
    assert bound.loss(5.0) == LossOut(20.0, 7.0, {})


def test_configure_refuses_unknown_names_and_lists_the_known():
    with pytest.raises(ValueError, match="option 'alpha' is none of the objective 'loss', which takes beta, gamma"):
        OBJECTIVE.configure(beta=1.0, alpha=2.0)
    with pytest.raises(ValueError, match="'loss', which takes beta, gamma"):
        OBJECTIVE.configure(beta=1.0).configure(example=0)
    with pytest.raises(ValueError, match="'sft', which takes none"):
        OBJECTIVES["sft"].configure(beta=1.0)


def test_statistics_are_asked_for_with_the_option_that_reads_them():
    asking = OBJECTIVE._replace(extra={"lse2": "gamma", "other": None})
    assert asking.statistics == ("other",)
    assert asking.configure(gamma=True).statistics == ("lse2", "other")
    assert asking.configure(gamma=True).configure(gamma=False, beta=2.0).statistics == ("other",)
    assert not any(objective.statistics for objective in OBJECTIVES.values())


def test_an_example_holds_nothing_by_default():
    assert jax.tree.leaves(Example()) == []
    assert set(Example._fields) >= {f for objective in OBJECTIVES.values() for f in objective.needs}


def test_the_registry_cannot_be_changed():
    with pytest.raises(TypeError):
        OBJECTIVES["mine"] = OBJECTIVE
    assert {"shiq", "dpo", "sft"} <= set(OBJECTIVES)
