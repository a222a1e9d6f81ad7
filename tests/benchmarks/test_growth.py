"""Exponents are slopes, and the compiler's own numbers keep their promises at small sizes."""

import dataclasses

import jax
import pytest

from benchmarks import growth
from shiq_jax.models import Model


def test_an_exponent_is_the_slope_in_logarithms():
    assert growth.exponent([1, 2, 4, 8], [3, 6, 12, 24]) == pytest.approx(1)
    assert growth.exponent([10, 100], [5, 500]) == pytest.approx(2)
    assert growth.exponent([1, 2, 4], [7, 7, 7]) == pytest.approx(0, abs=1e-12)


def test_the_statistics_hold_no_more_for_a_larger_vocabulary():
    slope, found = growth.memory_in_vocabulary((65_536, 131_072))
    assert slope < 0.05 and min(found) > 1e6


def test_a_step_holds_its_gradients_once():
    """Beside them is what the layers work with, which here is a few percent of the parameters."""
    config = dataclasses.replace(growth.SMALL, hidden_size=256, intermediate_size=1024, num_layers=8)
    compiled, _ = growth._compiled(config, 32, remat="full")
    parameters = sum(leaf.size * 4 for leaf in jax.tree.leaves(Model.from_config(config).abstract_params()))
    temporary = compiled.memory_analysis().temp_size_in_bytes
    assert parameters < temporary < 1.35 * parameters
