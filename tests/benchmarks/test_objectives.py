"""Benchmark steps of the objectives."""

import jax
import numpy as np
import pytest

from benchmarks import objectives
from shiq_jax.objectives import OBJECTIVES


@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_objective_step_has_finite_nonzero_gradients(name):
    function, statistics = objectives.objective_step(OBJECTIVES[name])
    value, gradient = function(statistics)
    leaves = jax.tree.leaves(gradient)
    assert np.isfinite(value) and all(np.isfinite(leaf).all() for leaf in leaves)
    assert any(leaf.size == objectives.TOKENS and np.any(leaf) for leaf in leaves)


def test_copy_step_copies_and_is_timed():
    function, array = objectives.copy_step()
    assert len(function(array)) == objectives.COPIES
    assert objectives.median_seconds(function, array, repeats=2) > 0
