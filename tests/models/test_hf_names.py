"""Reading regions of parameters from checkpoint tensors."""

import math

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shiq_jax.models import DecoderConfig, Model
from shiq_jax.models.hf_names import entries

CONFIG = DecoderConfig(11, 6, 10, 2, 4, 2, 8, attention_bias=True, mlp_bias=True)
ENTRIES = entries(Model.from_config(CONFIG).abstract_params(), CONFIG.num_layers)


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: ".".join(entry.path))
@settings(max_examples=20, deadline=None)
@given(st.data())
def test_read_matches_slicing_the_converted_tensor(entry, data):
    layer = np.arange(math.prod(entry.layer_shape)).reshape(entry.layer_shape)
    bounds = [sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in entry.layer_shape]
    index = tuple(slice(*pair) for pair in bounds)
    tensor = entry.to_tensor(layer)
    assert tensor.shape == entry.tensor_shape
    np.testing.assert_array_equal(entry.read(tensor, index), layer[index])


def test_kernel_is_the_transposed_tensor():
    entry = next(entry for entry in ENTRIES if entry.path == ("layers", "mlp", "down", "kernel"))
    assert (entry.layer_shape, entry.tensor_shape) == ((10, 6), (6, 10))
    tensor = np.random.default_rng(0).normal(size=(6, 10))
    np.testing.assert_array_equal(entry.read(tensor, (slice(0, 10), slice(0, 6))), tensor.T)


def test_read_touches_only_the_region():
    entry = next(entry for entry in ENTRIES if entry.path == ("layers", "attention", "query", "kernel"))

    class CountingTensor:
        elements_read = 0

        def __getitem__(self, index):
            region = np.zeros(entry.tensor_shape)[index]
            self.elements_read += region.size
            return region

    tensor = CountingTensor()
    entry.read(tensor, (slice(0, 3), slice(2, 4), slice(0, 8)))
    assert tensor.elements_read == 3 * 2 * 8


def test_tensor_names_are_unique():
    names = [name for entry in ENTRIES for name in entry.names]
    assert len(names) == len(set(names)) == 3 + CONFIG.num_layers * 16
    assert len(ENTRIES) == len(jax.tree.leaves(Model.from_config(CONFIG).abstract_params()))
