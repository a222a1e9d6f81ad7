"""Device mesh; it always has all four axes, so that sharding rules can name any of them."""

import math
from collections.abc import Mapping

import jax
from jax.sharding import AxisType, Mesh

AXES = ("replica", "fsdp", "sequence", "tensor")


def make_mesh(sizes: Mapping[str, int] | str | None = None) -> Mesh:
    """Make a mesh with the axes `replica`, `fsdp`, `sequence`, `tensor` over the devices of all processes.

    A single process may use fewer devices than it has, and then takes the first ones. Several processes must use all
    devices, because every process needs a device in the mesh. All axes are `AxisType.Auto`: the compiler propagates
    shardings inside jitted functions.

    Args:
        sizes: axis name -> size, as a mapping or as text ("fsdp=2,tensor=4"). Omitted axes have size 1; one axis may
            have size -1, for all remaining devices. None puts every device on `fsdp`.

    Raises:
        ValueError: an axis is unknown, a size is not a positive integer, or there are not enough devices.
    """
    shape = _mesh_shape(_parse(sizes), jax.device_count())
    count = math.prod(shape.values())
    if jax.process_count() > 1 and count != jax.device_count():
        raise ValueError(
            f"mesh {describe(shape)} uses {count} of {jax.device_count()} devices, and with {jax.process_count()} "
            "processes it must use all of them: give one axis the size -1"
        )
    return jax.make_mesh(
        tuple(shape.values()),
        AXES,
        axis_types=(AxisType.Auto,) * len(AXES),
        devices=None if count == jax.device_count() else jax.devices()[:count],
    )


def describe(shape: Mapping[str, int]) -> str:
    """Text form of a mesh shape, "fsdp=2,tensor=4", without the axes of size 1."""
    return ",".join(f"{axis}={size}" for axis, size in shape.items() if size != 1) or "fsdp=1"


def _parse(sizes: Mapping[str, int] | str | None) -> dict[str, int]:
    if sizes is None:
        return {"fsdp": -1}
    if not isinstance(sizes, str):
        return dict(sizes)
    parsed: dict[str, int] = {}
    for entry in filter(None, (part.strip() for part in sizes.split(","))):
        axis, separator, size = (text.strip() for text in entry.partition("="))
        if not separator or not size.removeprefix("-").isdigit():
            raise ValueError(f'mesh "{sizes}": "{entry}" is not AXIS=SIZE; expected for example "fsdp=2,tensor=4"')
        if axis in parsed:
            raise ValueError(f'mesh "{sizes}": axis {axis} is given twice; give every axis one size')
        parsed[axis] = int(size)
    return parsed


def _mesh_shape(sizes: dict[str, int], devices: int) -> dict[str, int]:
    """The sizes of all four axes, with -1 resolved."""
    unknown = [axis for axis in sizes if axis not in AXES]
    if unknown:
        raise ValueError(f"mesh: unknown axis {unknown[0]}; the axes are {', '.join(AXES)}")
    for axis, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or (size < 1 and size != -1):
            raise ValueError(
                f"mesh: axis {axis} has size {size!r}; give a positive integer, or -1 for all remaining devices"
            )
    inferred_axes = [axis for axis, size in sizes.items() if size == -1]
    if len(inferred_axes) > 1:
        raise ValueError(
            f"mesh: {' and '.join(inferred_axes)} have size -1; only one axis can take all remaining devices"
        )
    product = math.prod(size for size in sizes.values() if size != -1)
    if product > devices or (inferred_axes and devices % product):
        problem = "there are only" if product > devices else "does not divide the"
        raise ValueError(
            f"mesh: the product of the sizes is {product}, but {problem} {devices} devices; choose sizes whose product "
            f"divides {devices}"
        )
    return {axis: devices // product if sizes.get(axis) == -1 else sizes.get(axis, 1) for axis in AXES}
