"""Scaling exponents, and the compiler's memory analysis at small sizes."""

import dataclasses

import jax
import pytest

from benchmarks import growth
from shiq_jax.models import Model


def test_exponent_is_the_log_log_slope():
    assert growth.exponent([1, 2, 4, 8], [3, 6, 12, 24]) == pytest.approx(1)
    assert growth.exponent([10, 100], [5, 500]) == pytest.approx(2)
    assert growth.exponent([1, 2, 4], [7, 7, 7]) == pytest.approx(0, abs=1e-12)


def test_token_stats_memory_is_independent_of_vocabulary():
    slope, sizes = growth.memory_in_vocabulary((65_536, 131_072))
    assert slope < 0.05 and min(sizes) > 1e6


def test_update_step_holds_one_copy_of_the_gradients():
    """The temporary memory is one gradient plus the activations, which are small in this model."""
    config = dataclasses.replace(growth.SMALL, hidden_size=256, intermediate_size=1024, num_layers=8)
    compiled, _ = growth._compiled_update(config, 32, remat="full")
    parameters = sum(leaf.size * 4 for leaf in jax.tree.leaves(Model.from_config(config).abstract_params()))
    temporary = compiled.memory_analysis().temp_size_in_bytes
    assert parameters < temporary < 1.35 * parameters
