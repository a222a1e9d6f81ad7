"""Sharding rules: logical axes to partition specs; dimensions that do not divide are replicated."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from shiq_jax.sharding import RULES, constrain, make_mesh, named_sharding, partition_spec

MESH = make_mesh("replica=2,fsdp=2,tensor=2")


@pytest.mark.parametrize(
    ("axes", "shape", "spec"),
    [
        (("embed", "heads", "head_dim"), (6, 4, 8), P("fsdp", "tensor", None)),
        (("embed", "kv_heads", "head_dim"), (6, 3, 8), P("fsdp", None, None)),
        (("rows", "length", "features"), (8, 5, 6), P(("replica", "fsdp"), None, None)),
        (("rows", None), (2, 5), P("replica", None)),
        (("rows", None), (3, 5), P(None, None)),
        (("vocab", "mlp"), (4, 4), P("tensor", None)),
        ((), (), P()),
    ],
)
def test_partition_spec(axes, shape, spec):
    assert partition_spec(MESH, axes, shape) == spec


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([*RULES, None]), st.integers(1, 12)), min_size=1, max_size=4))
def test_any_shape_can_be_sharded(dimensions):
    axes, shape = zip(*dimensions, strict=True)
    sharding = named_sharding(MESH, axes, shape)
    assert sharding.shard_shape(shape)  # raises if an axis does not divide
    used = [axis for entry in sharding.spec if entry for axis in ((entry,) if isinstance(entry, str) else entry)]
    assert len(used) == len(set(used))


def test_constrain_inside_jit():
    x = jnp.arange(48.0).reshape(8, 6)
    out = jax.jit(lambda x: constrain(x + 1, ("rows", "mlp"), MESH))(x)
    assert out.sharding.is_equivalent_to(named_sharding(MESH, ("rows", "mlp"), x.shape), 2)
    assert math.prod(out.sharding.shard_shape(x.shape)) == 48 // 8
    np.testing.assert_array_equal(out, x + 1)


def test_constrain_without_a_mesh_is_the_identity():
    x = jnp.ones(3)
    assert constrain(x, ("unknown",), None) is x


def test_invalid_logical_axes_are_rejected():
    with pytest.raises(ValueError, match=r"2 dimensions, but the shape is \(3,\)"):
        partition_spec(MESH, ("embed", "mlp"), (3,))
    with pytest.raises(ValueError, match="unknown logical axis 'width'; expected one of rows"):
        partition_spec(MESH, ("width",), (3,))
