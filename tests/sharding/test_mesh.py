"""Mesh construction: shapes from text and mappings, and errors."""

import jax
import pytest
from jax.sharding import AxisType

from shiq_jax.sharding import AXES, describe, make_mesh


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        (None, (1, 8, 1, 1)),
        ("", (1, 1, 1, 1)),
        ("fsdp=2,tensor=4", (1, 2, 1, 4)),
        (" replica = 2 , sequence=2, tensor=2", (2, 1, 2, 2)),
        ({"tensor": 8}, (1, 1, 1, 8)),
        ("fsdp=-1,tensor=2", (1, 4, 1, 2)),
        ({"replica": 4, "fsdp": -1}, (4, 2, 1, 1)),
    ],
)
def test_mesh_shape(sizes, shape):
    mesh = make_mesh(sizes)
    assert mesh.axis_names == AXES == ("replica", "fsdp", "sequence", "tensor")
    assert tuple(mesh.shape.values()) == shape
    assert mesh.axis_types == (AxisType.Auto,) * 4


def test_single_process_can_use_fewer_devices():
    assert set(make_mesh("fsdp=2,tensor=2").devices.flat) == set(jax.devices()[:4])


@pytest.mark.parametrize("text", ["fsdp=2,tensor=4", "replica=2", "fsdp=1"])
def test_describe_inverts_make_mesh(text):
    assert describe(make_mesh(text).shape) == text
    assert make_mesh(describe(make_mesh(text).shape)) == make_mesh(text)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ("fsdp", "AXIS=SIZE"),
        ("fsdp=two", "AXIS=SIZE"),
        ("fsdp=2,fsdp=4", "given twice"),
        ("data=8", "unknown axis data; the axes are replica, fsdp, sequence, tensor"),
        ({"fsdp": 0}, "size 0"),
        ({"fsdp": 2.0}, "size 2.0"),
        ("fsdp=-1,tensor=-1", "fsdp and tensor"),
        ("fsdp=16", "only 8 devices"),
        ("fsdp=-1,tensor=3", "does not divide"),
    ],
)
def test_invalid_sizes_are_rejected(sizes, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(sizes)
