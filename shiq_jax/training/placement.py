"""Which devices a run uses, and how a batch gets to them."""

from __future__ import annotations

import jax
from jax.sharding import Mesh

from shiq_jax.errors import UserError
from shiq_jax.replay import Batch
from shiq_jax.sharding import make_mesh, named_sharding


def requested_mesh(sizes: str | None) -> Mesh | None:
    """The mesh that `--mesh` asks for; without it all devices on fsdp, and none at all for a single device.

    Raises:
        UserError: the sizes are malformed or the devices do not suffice.
    """
    if sizes is None and jax.device_count() == 1:
        return None
    try:
        return make_mesh(sizes)
    except ValueError as error:
        raise UserError(f"--mesh {sizes}: {error}") from error


def place(batch: Batch, mesh: Mesh | None) -> Batch:
    """The batch on its devices, rows over the data axes; every process hands over only the rows that it owns."""
    if mesh is None:
        return jax.device_put(batch)

    def put(leaf):
        sharding = named_sharding(mesh, ("rows", *(None,) * (leaf.ndim - 1)), leaf.shape)
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])

    return jax.tree.map(put, batch)


def data_devices(mesh: Mesh | None) -> int:
    """Over how many devices the rows of a batch are spread."""
    return 1 if mesh is None else mesh.shape["replica"] * mesh.shape["fsdp"]
