"""The fingerprint depends on bits and positions, not on sharding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shiq_jax.models import DecoderConfig, Model, fingerprint
from shiq_jax.sharding import make_mesh

CONFIG = DecoderConfig(64, 32, 48, 2, 4, 2)


def test_fingerprint_is_independent_of_mesh(random_params):
    params = random_params(Model.from_config(CONFIG))
    fingerprints = {fingerprint(params)}
    for mesh in ("fsdp=8", "replica=2,fsdp=2,tensor=2"):
        shardings = jax.tree.map(
            lambda leaf: leaf.sharding, Model.from_config(CONFIG, mesh=make_mesh(mesh)).abstract_params()
        )
        fingerprints.add(fingerprint(jax.device_put(params, shardings)))
    assert len(fingerprints) == 1
    assert len(fingerprints.pop()) == 64


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 11), st.integers(0, 11))
def test_swapped_elements_change_the_fingerprint(i, j):
    array = np.arange(12, dtype=np.float32)
    swapped = array.copy()
    swapped[[i, j]] = swapped[[j, i]]
    same = fingerprint({"a": array.reshape(3, 4)}) == fingerprint({"a": swapped.reshape(3, 4)})
    assert same == (i == j)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16, jnp.int8, jnp.bool_])
def test_changed_element_changes_the_fingerprint(dtype):
    array = jnp.zeros((5, 7), dtype)
    assert fingerprint({"a": array}) != fingerprint({"a": array.at[4, 6].set(True)})
    assert fingerprint({"a": array}) == fingerprint({"a": jnp.zeros((5, 7), dtype)})


def test_smallest_change_changes_the_fingerprint():
    array = jnp.ones(100)
    assert fingerprint({"a": array}) != fingerprint({"a": array.at[50].set(np.nextafter(np.float32(1), np.float32(2)))})
    assert fingerprint({"a": jnp.zeros(1)}) != fingerprint({"a": -jnp.zeros(1)})


def test_names_shapes_and_dtypes_change_the_fingerprint():
    zeros = jnp.zeros((2, 3))
    trees = [
        {"a": zeros},
        {"b": zeros},
        {"a": {"b": zeros}},
        {"a": zeros.T},
        {"a": zeros.astype(jnp.int32)},
        {"a": zeros, "b": zeros},
        {},
    ]
    assert len({fingerprint(tree) for tree in trees}) == len(trees)


def test_fingerprint_is_independent_of_insertion_order():
    x, y = jnp.ones(2), jnp.zeros(3)
    assert fingerprint({"x": x, "y": y}) == fingerprint({"y": y, "x": x})


def test_fingerprint_of_float64():
    with jax.enable_x64(True):
        array = jnp.arange(3, dtype=jnp.float64)
        assert fingerprint({"a": array}) == fingerprint({"a": array + 0})
        assert fingerprint({"a": array}) != fingerprint({"a": array.at[1].add(1e-16).at[2].multiply(1 + 1e-15)})
