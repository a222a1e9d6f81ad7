"""Multi-process runs: the writer process, barriers, and copies of sharded arrays on the host.

The processes of a run are those that `start_processes` joined. With a single process every function here works without
communication.

All processes of a run must make the same calls in the same order, and share a file system. Files change only between
the barriers of `on_writer`, so that all processes see the same files and take the same branches.
"""

from __future__ import annotations

import collections
import contextvars
import functools
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Sharding

from shiq_jax.errors import UserError

# Seconds that a process waits for the others at a barrier.
TIMEOUT = 600

# Inside an `on_writer` function only the writer runs, so it must not wait for the other processes.
_writing = contextvars.ContextVar("writing", default=False)
# Uses of each barrier name, because a barrier key can be used only once.
_barrier_uses: collections.Counter[str] = collections.Counter()


def process_count() -> int:
    """Number of processes of the run."""
    # jax.process_count() initializes the devices, which writing a file in a single process must not do.
    return jax.process_count() if jax.distributed.is_initialized() else 1


def is_writer() -> bool:
    """Whether this process writes the files that all processes share."""
    return process_count() == 1 or jax.process_index() == 0


def on_writer(function: Callable | None = None, *, wait: bool = True) -> Callable:
    """Decorate a function that writes to disk, so that only the writer runs it.

    Every process calls the decorated function. The writer runs it when all processes have called it. Every process
    returns its result, a JSON value, or raises its error: a UserError as UserError, any other error as RuntimeError.

    Args:
        function: the function. Decorated functions that it calls run without a barrier.
        wait: False if no process reads what is written: no process waits, and the others return None.
    """
    if function is None:
        return functools.partial(on_writer, wait=wait)
    name = f"{function.__module__}.{getattr(function, '__qualname__', repr(function))}"

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if _needs_no_sync():
            return function(*args, **kwargs)
        if wait:
            return _run_and_broadcast(functools.partial(function, *args, **kwargs), name)
        return _run_as_writer(functools.partial(function, *args, **kwargs)) if is_writer() else None

    return call


def barrier(name: str, timeout: float = TIMEOUT) -> None:
    """Wait until every process has reached the barrier of this name.

    Raises:
        RuntimeError: some process did not reach it within `timeout` seconds.
    """
    if _needs_no_sync():
        return
    from orbax.checkpoint import multihost

    _barrier_uses[name] += 1
    try:
        multihost.get_barrier_sync_fn()(key=f"{name} {_barrier_uses[name]}", timeout_ms=round(1000 * timeout))
    except Exception as error:
        raise RuntimeError(
            f"process {jax.process_index()} of {process_count()} waited {timeout:g} s at {name!r}, which the other "
            "processes did not reach: check their output, then start the same command on every host again"
        ) from error


def agree(value: Any, name: str, timeout: float = TIMEOUT) -> Any:
    """Broadcast the JSON value of process 0 to every process.

    Args:
        value: strings, numbers, lists and dicts; ignored on other processes.
        name: name of the value in the message of a timeout.
        timeout: seconds to wait for the others.
    """
    if _needs_no_sync():
        return value
    text = json.dumps(value).encode() if is_writer() else b""
    barrier(f"agree on {name}", timeout)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    padded = np.frombuffer(text.ljust(size, b" "), np.uint8)
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(padded), np.uint8).tobytes())


def gather(tree: Any) -> Any:
    """Copy a pytree of arrays to numpy arrays; every process gets the full arrays, whatever their sharding.

    Every process must call it, because arrays that span several processes are gathered from all of them.
    """
    leaves, structure = jax.tree.flatten(tree)
    # One call for all leaves, so that their copies to the host overlap.
    local = iter(jax.device_get([leaf for leaf in leaves if not _spans_processes(leaf)]))
    gathered = [
        multihost_utils.process_allgather(leaf, tiled=True) if _spans_processes(leaf) else next(local)
        for leaf in leaves
    ]
    return jax.tree.unflatten(structure, gathered)


class HostArray(NamedTuple):
    """An array offloaded to host memory; each process holds the shards of its own devices."""

    shape: tuple[int, ...]
    sharding: Sharding
    shards: dict[tuple, np.ndarray]


def offload(tree: Any) -> Any:
    """Copy a pytree of arrays to host memory, each process its own shards; see `reload`."""
    return jax.tree.map(_offload_array, tree)


def reload(tree: Any) -> Any:
    """Copy the result of `offload` back to the devices, in the original shardings."""

    def put(leaf: HostArray) -> jax.Array:
        return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: leaf.shards[_hashable(index)])

    return jax.tree.map(put, tree, is_leaf=lambda leaf: isinstance(leaf, HostArray))


def _spans_processes(leaf: Any) -> bool:
    """Whether no single process holds the full array."""
    return isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated)


def _needs_no_sync() -> bool:
    """Whether there is a single process, or only the writer runs the current function."""
    return process_count() == 1 or _writing.get()


def _run_as_writer(action: Callable[[], Any]) -> Any:
    """Run `action` without waiting for the other processes inside it."""
    token = _writing.set(True)
    try:
        return action()
    finally:
        _writing.reset(token)


def _run_and_broadcast(action: Callable[[], Any], name: str) -> Any:
    """Run `action` on the writer and return its result, or raise its error, on every process."""
    barrier(name)
    outcome, writer_error = None, None
    if is_writer():
        try:
            outcome = {"result": _run_as_writer(action)}
            json.dumps(outcome)
        # BaseException: whatever ends the writer must end the other processes, which would otherwise wait for it.
        except BaseException as error:
            outcome = {"error": str(error) or repr(error), "user_error": isinstance(error, UserError)}
            writer_error = error
    outcome = agree(outcome, f"the result of {name}")
    if writer_error is not None:
        raise writer_error
    if "error" in outcome:
        raise (UserError if outcome["user_error"] else RuntimeError)(outcome["error"])
    return outcome["result"]


def _offload_array(leaf: jax.Array) -> HostArray:
    shards = {}
    for shard in leaf.addressable_shards:
        if _hashable(shard.index) not in shards:
            # Copy: a numpy view of a CPU array shares memory that a later donation may overwrite.
            shards[_hashable(shard.index)] = np.array(shard.data, copy=True)
    return HostArray(leaf.shape, leaf.sharding, shards)


def _hashable(index: tuple[slice, ...]) -> tuple:
    """Slices as tuples, because slices are not hashable before Python 3.12."""
    return tuple((part.start, part.stop, part.step) for part in index)
