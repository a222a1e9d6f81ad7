"""The mesh: four named axes, always all four, so that every rule may name any of them."""

import math
from collections.abc import Mapping

import jax
from jax.sharding import AxisType, Mesh

AXES = ("replica", "fsdp", "sequence", "tensor")


def make_mesh(sizes: Mapping[str, int] | str | None = None) -> Mesh:
    """A mesh with the axes `replica`, `fsdp`, `sequence`, `tensor`, over the devices of all processes.

    sizes: axis name -> number of devices, as a mapping or as text ("fsdp=2,tensor=4"); axes not named have size 1, and
    at most one axis may be -1, which takes the devices that the others leave. None puts every device on `fsdp`.

    One process may ask for fewer devices than it has (the first ones are taken); several processes must use all of
    them, because a process without a device in the mesh could not take part in the computation.

    All axes are `AxisType.Auto`: shardings inside a jitted function are the compiler's to propagate.
    Raises ValueError when an axis is unknown, a size is not a positive integer, or the devices do not suffice.
    """
    shape = _complete(_parse(sizes), jax.device_count())
    count = math.prod(shape.values())
    if jax.process_count() > 1 and count != jax.device_count():
        raise ValueError(
            f"mesh {describe(shape)} uses {count} of {jax.device_count()} devices, and with {jax.process_count()} "
            "processes it must use all: give one axis the size -1 to take the rest"
        )
    return jax.make_mesh(
        tuple(shape.values()),
        AXES,
        axis_types=(AxisType.Auto,) * len(AXES),
        devices=None if count == jax.device_count() else jax.devices()[:count],
    )


def describe(shape: Mapping[str, int]) -> str:
    """The text form of a mesh shape, "fsdp=2,tensor=4", leaving out axes of size 1."""
    return ",".join(f"{axis}={size}" for axis, size in shape.items() if size != 1) or "fsdp=1"


def _parse(sizes: Mapping[str, int] | str | None) -> dict[str, int]:
    if sizes is None:
        return {"fsdp": -1}
    if not isinstance(sizes, str):
        return dict(sizes)
    parsed: dict[str, int] = {}
    for item in filter(None, (part.strip() for part in sizes.split(","))):
        axis, separator, size = (text.strip() for text in item.partition("="))
        if not separator or not size.removeprefix("-").isdigit():
            raise ValueError(f'mesh "{sizes}": "{item}" is not AXIS=SIZE; write it like "fsdp=2,tensor=4"')
        if axis in parsed:
            raise ValueError(f'mesh "{sizes}": axis {axis} is given twice; give every axis one size')
        parsed[axis] = int(size)
    return parsed


def _complete(sizes: dict[str, int], devices: int) -> dict[str, int]:
    unknown = [axis for axis in sizes if axis not in AXES]
    if unknown:
        raise ValueError(f"mesh: unknown axis {unknown[0]}; the axes are {', '.join(AXES)}")
    for axis, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or (size < 1 and size != -1):
            raise ValueError(
                f"mesh: axis {axis} has size {size!r}; give a positive integer, or -1 for the devices that are left"
            )
    open_axes = [axis for axis, size in sizes.items() if size == -1]
    if len(open_axes) > 1:
        raise ValueError(
            f"mesh: {' and '.join(open_axes)} both have size -1; only one axis can take the devices that are left"
        )
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if fixed > devices or (open_axes and devices % fixed):
        fault = "there are only" if fixed > devices else "they do not divide the"
        raise ValueError(
            f"mesh: the given sizes multiply to {fixed} but {fault} {devices} devices; choose sizes whose product "
            f"divides {devices}"
        )
    return {axis: devices // fixed if sizes.get(axis) == -1 else sizes.get(axis, 1) for axis in AXES}
