"""Logical axis names, and the mesh axes that each of them is cut over.

A parameter or an activation says what its dimensions *are* ("embed", "heads", "rows"); only this file says where they
go.
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
    """The mesh axes over which an array of `shape` with these logical axes is cut.

    A dimension keeps the longest prefix of its rule's mesh axes whose sizes, multiplied, divide it; the rest is
    dropped, so that dimension is replicated over them. (3 key-value heads on tensor=2 are replicated; 4 rows on
    replica=2, fsdp=4 are cut in two.) Nothing is ever padded. A mesh axis that the mesh lacks, or that has size 1, is
    left out as well, and no mesh axis is used twice: the first dimension that asks for it has it.

    logical_axes: one name of `RULES`, or None (replicated), for each dimension.
    Raises ValueError for an unknown name or when the number of names differs from the number of dimensions.
    """
    if len(logical_axes) != len(shape):
        raise ValueError(
            f"logical axes {tuple(logical_axes)} name {len(logical_axes)} dimensions, the shape is {tuple(shape)}"
        )
    used: set[str] = set()
    spec = []
    for name, size in zip(logical_axes, shape, strict=True):
        if name is not None and name not in RULES:
            raise ValueError(f"unknown logical axis {name!r}; the known ones are {', '.join(RULES)}")
        kept: list[str] = []
        for axis in RULES[name] if name is not None else ():
            if axis in used or mesh.shape.get(axis, 1) == 1:
                continue
            if size % math.prod(mesh.shape[other] for other in (*kept, axis)):
                break
            kept.append(axis)
        used.update(kept)
        spec.append(tuple(kept) if len(kept) > 1 else kept[0] if kept else None)
    return PartitionSpec(*spec)


def named_sharding(mesh: Mesh, logical_axes: LogicalAxes, shape: Sequence[int]) -> NamedSharding:
    """The sharding of an array with these logical axes; axes that do not divide are dropped (`partition_spec`)."""
    return NamedSharding(mesh, partition_spec(mesh, logical_axes, shape))


def constrain(x: jax.Array, logical_axes: LogicalAxes, mesh: Mesh | None) -> jax.Array:
    """`x`, with its sharding pinned to what the rules say; `x` itself when there is no mesh."""
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, named_sharding(mesh, logical_axes, x.shape))
