"""Every objective can be timed, on as many tokens as the statistics are."""

import jax
import numpy as np
import pytest

from benchmarks import objectives
from shiq_jax.objectives import OBJECTIVES


@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_a_step_has_a_finite_gradient_of_every_token(name):
    function, learned = objectives.objective_step(OBJECTIVES[name])
    value, gradient = function(learned)
    leaves = jax.tree.leaves(gradient)
    assert np.isfinite(value) and all(np.isfinite(leaf).all() for leaf in leaves)
    assert any(leaf.size == objectives.TOKENS and np.any(leaf) for leaf in leaves)


def test_copies_are_as_many_and_the_clock_runs():
    function, array = objectives.copying()
    assert len(function(array)) == objectives.COPIES
    assert objectives.seconds(function, array, repeats=2) > 0
