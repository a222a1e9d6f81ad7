"""Every region of every parameter is read from a checkpoint as if the whole tensor had been read and rearranged."""

import math

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shiq_jax.models import DecoderConfig, Model
from shiq_jax.models.hf_names import entries

CONFIG = DecoderConfig(11, 6, 10, 2, 4, 2, 8, attention_bias=True, mlp_bias=True)
PLAN = entries(Model.from_config(CONFIG).abstract_params(), CONFIG.num_layers)


@pytest.mark.parametrize("entry", PLAN, ids=lambda entry: ".".join(entry.path))
@settings(max_examples=20, deadline=None)
@given(st.data())
def test_regions(entry, data):
    part = np.arange(math.prod(entry.part)).reshape(entry.part)
    bounds = [sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in entry.part]
    index = tuple(slice(*pair) for pair in bounds)
    tensor = entry.to_tensor(part)
    assert tensor.shape == entry.tensor_shape
    np.testing.assert_array_equal(entry.read(tensor, index), part[index])


def test_a_kernel_is_the_transposed_tensor():
    entry = next(entry for entry in PLAN if entry.path == ("layers", "mlp", "down", "kernel"))
    assert (entry.part, entry.tensor_shape) == ((10, 6), (6, 10))
    tensor = np.random.default_rng(0).normal(size=(6, 10))
    np.testing.assert_array_equal(entry.read(tensor, (slice(0, 10), slice(0, 6))), tensor.T)


def test_no_more_is_read_than_the_region_needs():
    entry = next(entry for entry in PLAN if entry.path == ("layers", "attention", "query", "kernel"))

    class Counting:
        read = 0

        def __getitem__(self, index):
            piece = np.zeros(entry.tensor_shape)[index]
            Counting.read += piece.size
            return piece

    entry.read(Counting(), (slice(0, 3), slice(2, 4), slice(0, 8)))
    assert Counting.read == 3 * 2 * 8


def test_every_tensor_is_named_once():
    names = [name for entry in PLAN for name in entry.names]
    assert len(names) == len(set(names)) == 3 + CONFIG.num_layers * 16
    assert len(PLAN) == len(jax.tree.leaves(Model.from_config(CONFIG).abstract_params()))
