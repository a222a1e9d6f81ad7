"""Select the mesh and shard batches over it."""

from __future__ import annotations

import jax
from jax.sharding import Mesh

from shiq_jax.errors import UserError
from shiq_jax.replay import Batch
from shiq_jax.sharding import make_mesh, named_sharding


def mesh_from_flag(sizes: str | None) -> Mesh | None:
    """The mesh of a `--mesh` flag. Without the flag: all devices on `fsdp`, or None if there is only one device.

    Raises:
        UserError: the sizes are malformed or need more devices than there are.
    """
    if sizes is None and jax.device_count() == 1:
        return None
    try:
        return make_mesh(sizes)
    except ValueError as error:
        raise UserError(f"--mesh {sizes}: {error}") from error


def shard_batch(batch: Batch, mesh: Mesh | None) -> Batch:
    """Put a batch on the devices, its rows sharded over the data axes; each process transfers only its own rows."""
    if mesh is None:
        return jax.device_put(batch)

    def put(leaf):
        sharding = named_sharding(mesh, ("rows", *(None,) * (leaf.ndim - 1)), leaf.shape)
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])

    return jax.tree.map(put, batch)


def data_parallel_size(mesh: Mesh | None) -> int:
    """Number of devices over which the rows of a batch are sharded."""
    return 1 if mesh is None else mesh.shape["replica"] * mesh.shape["fsdp"]
