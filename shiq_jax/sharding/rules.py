"""Sharding rules: logical axis names ("embed", "heads", "rows") -> mesh axes.

Models declare logical axes; only this file maps them to mesh axes.
"""

import math
from collections.abc import Mapping, Sequence

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

LogicalAxes = Sequence[str | None]

RULES: Mapping[str, tuple[str, ...]] = {
    # activations
    "rows": ("replica", "fsdp"),
    "length": ("sequence",),
    "features": (),
    # parameters
    "layers": (),
    "embed": ("fsdp",),
    "vocab": ("tensor",),
    "mlp": ("tensor",),
    "norm": (),
    "rank": (),
    # both
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
}


def partition_spec(mesh: Mesh, logical_axes: LogicalAxes, shape: Sequence[int]) -> PartitionSpec:
    """The partition spec of an array of `shape` with these logical axes.

    A dimension is sharded over the longest prefix of its rule's mesh axes whose product divides its size, and
    replicated over the others: 3 key-value heads on tensor=2 are replicated, and 4 rows on replica=2, fsdp=4 are split
    in two. Arrays are never padded. Mesh axes of size 1 are omitted. A mesh axis is used once, by the first dimension
    whose rule has it.

    Args:
        mesh: the mesh.
        logical_axes: for each dimension a key of `RULES`, or None (replicated).
        shape: shape of the array.

    Raises:
        ValueError: a name is unknown, or the number of names differs from the number of dimensions.
    """
    if len(logical_axes) != len(shape):
        raise ValueError(
            f"logical axes {tuple(logical_axes)} name {len(logical_axes)} dimensions, but the shape is {tuple(shape)}"
        )
    used: set[str] = set()
    spec = []
    for name, size in zip(logical_axes, shape, strict=True):
        if name is not None and name not in RULES:
            raise ValueError(f"unknown logical axis {name!r}; expected one of {', '.join(RULES)}")
        mesh_axes: list[str] = []
        for axis in RULES[name] if name is not None else ():
            if axis in used or mesh.shape.get(axis, 1) == 1:
                continue
            if size % math.prod(mesh.shape[mesh_axis] for mesh_axis in (*mesh_axes, axis)):
                break
            mesh_axes.append(axis)
        used.update(mesh_axes)
        spec.append(tuple(mesh_axes) if len(mesh_axes) > 1 else mesh_axes[0] if mesh_axes else None)
    return PartitionSpec(*spec)


def named_sharding(mesh: Mesh, logical_axes: LogicalAxes, shape: Sequence[int]) -> NamedSharding:
    """The sharding of an array with these logical axes; see `partition_spec`."""
    return NamedSharding(mesh, partition_spec(mesh, logical_axes, shape))


def constrain(x: jax.Array, logical_axes: LogicalAxes, mesh: Mesh | None) -> jax.Array:
    """Constrain the sharding of `x` to that of its logical axes; without a mesh return `x` unchanged."""
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, named_sharding(mesh, logical_axes, x.shape))
