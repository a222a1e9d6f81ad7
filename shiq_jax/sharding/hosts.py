"""Processes of one run: which of them writes, where they wait for each other, and what a sharded array holds.

With one process every function here is free: it writes, waits for nobody and copies from its own devices.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Sharding

# Seconds that a process waits at a barrier for the others.
TIMEOUT = 600


def is_writer() -> bool:
    """Whether this process writes what all processes share: files, logs, pictures."""
    return jax.process_index() == 0


def barrier(name: str, timeout: int = TIMEOUT) -> None:
    """Wait until every process has come to the barrier of this name.

    Raises RuntimeError, naming the barrier, when some process does not come within `timeout` seconds.
    """
    if jax.process_count() == 1:
        return
    from orbax.checkpoint import multihost

    try:
        multihost.sync_global_processes(name, timeout=timeout)
    except Exception as error:
        raise RuntimeError(
            f"process {jax.process_index()} of {jax.process_count()} waited {timeout} s at {name!r} and the others did "
            "not come: look at their output, then start the same command on every host again"
        ) from error


def agree(value: Any, name: str, timeout: int = TIMEOUT) -> Any:
    """The JSON value of process 0, on every process.

    Args:
        value: strings, numbers, lists and dicts; that of the other processes is not looked at.
        name: of what is agreed on, for the message of a process that waits in vain.
        timeout: seconds to wait for the others.
    """
    if jax.process_count() == 1:
        return value
    barrier(f"agree on {name}", timeout)
    text = json.dumps(value).encode()
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    padded = np.frombuffer(text[:size].ljust(size, b" "), np.uint8)
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(padded), np.uint8).tobytes())


def gather(tree: Any) -> Any:
    """A pytree of arrays as numpy arrays, whole on every process, however they are sharded.

    Every process must call it, for arrays that no process holds whole are gathered over all of them.
    """
    return jax.tree.map(_gathered, tree)


def _gathered(leaf: Any) -> Any:
    if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
        return multihost_utils.process_allgather(leaf, tiled=True)
    return jax.device_get(leaf)


class OnHost(NamedTuple):
    """One array in the memory of its hosts: each process has the parts that its own devices held."""

    shape: tuple[int, ...]
    sharding: Sharding
    parts: dict[tuple, np.ndarray]


def offload(tree: Any) -> Any:
    """A pytree of arrays copied to host memory, each process its own parts; see `reload`."""
    return jax.tree.map(_offloaded, tree)


def reload(tree: Any) -> Any:
    """What `offload` returned, back on the devices in the shardings that it had."""

    def put(leaf: OnHost) -> jax.Array:
        return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: leaf.parts[_place(index)])

    return jax.tree.map(put, tree, is_leaf=lambda leaf: isinstance(leaf, OnHost))


def _offloaded(leaf: jax.Array) -> OnHost:
    # Copied, since a numpy view of a CPU array shares memory that a later donation takes away.
    parts = {_place(shard.index): np.array(shard.data, copy=True) for shard in leaf.addressable_shards}
    return OnHost(leaf.shape, leaf.sharding, parts)


def _place(index: tuple[slice, ...]) -> tuple:
    return tuple((part.start, part.stop, part.step) for part in index)
