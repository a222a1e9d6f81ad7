"""Processes of one run: which one writes, where they wait for each other, and what sharded arrays hold.

Several processes are those that `start_processes` joined. With one, every function here is free: it writes, waits for
nobody and copies from its own devices.

All processes of a run make the same calls in the same order. The files lie on a disk that all of them see, and files
change between the barriers of `on_writer` only, so that all processes find the same files and take the same branches.
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

# Seconds that a process waits at a barrier for the others.
TIMEOUT = 600

# Inside a function of `on_writer` the other processes are elsewhere, so nothing there may wait for them.
_writing = contextvars.ContextVar("writing", default=False)
# How often this process has been at each barrier, because a barrier is used once.
_passed: collections.Counter[str] = collections.Counter()


def process_count() -> int:
    """How many processes take part in the run."""
    # A process that is alone must not start its devices in order to write a file.
    return jax.process_count() if jax.distributed.is_initialized() else 1


def is_writer() -> bool:
    """Whether this process writes the files that all processes share."""
    return process_count() == 1 or jax.process_index() == 0


def on_writer(function: Callable | None = None, *, wait: bool = True) -> Callable:
    """Decorate a function that writes to disk, so that only the writer runs it.

    Every process calls the decorated function. The writer runs it once all of them have come, and every process
    returns its result, a JSON value, or raises its error: a UserError as UserError, any other error as RuntimeError.

    Args:
        function: what to run. Decorated functions that it calls run at once.
        wait: False where no process reads what is written: the others return None at once, and nobody waits.
    """
    if function is None:
        return functools.partial(on_writer, wait=wait)
    name = f"{function.__module__}.{getattr(function, '__qualname__', repr(function))}"

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if _alone():
            return function(*args, **kwargs)
        if wait:
            return _shared(functools.partial(function, *args, **kwargs), name)
        return _run(functools.partial(function, *args, **kwargs)) if is_writer() else None

    return call


def barrier(name: str, timeout: float = TIMEOUT) -> None:
    """Wait until every process has come to the barrier of this name.

    Raises RuntimeError, naming the barrier, when some process does not come within `timeout` seconds.
    """
    if _alone():
        return
    from orbax.checkpoint import multihost

    _passed[name] += 1
    try:
        multihost.get_barrier_sync_fn()(key=f"{name} {_passed[name]}", timeout_ms=round(1000 * timeout))
    except Exception as error:
        raise RuntimeError(
            f"process {jax.process_index()} of {process_count()} waited up to {timeout:g} s at {name!r} and the others did not "
            "come: look at their output, then start the same command on every host again"
        ) from error


def agree(value: Any, name: str, timeout: float = TIMEOUT) -> Any:
    """The JSON value of process 0, on every process.

    Args:
        value: strings, numbers, lists and dicts; that of the other processes is ignored.
        name: of what is agreed on, for the message of a process that waits in vain.
        timeout: seconds to wait for the others.
    """
    if _alone():
        return value
    text = json.dumps(value).encode() if is_writer() else b""
    barrier(f"agree on {name}", timeout)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    padded = np.frombuffer(text.ljust(size, b" "), np.uint8)
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(padded), np.uint8).tobytes())


def gather(tree: Any) -> Any:
    """A pytree of arrays as numpy arrays, whole on every process, however they are sharded.

    Every process must call it, because arrays that no process holds whole are gathered over all of them.
    """
    leaves, structure = jax.tree.flatten(tree)
    # In one call, so that all copies to the host are under way together.
    copied = iter(jax.device_get([leaf for leaf in leaves if not _spread(leaf)]))
    whole = [multihost_utils.process_allgather(leaf, tiled=True) if _spread(leaf) else next(copied) for leaf in leaves]
    return jax.tree.unflatten(structure, whole)


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


def _spread(leaf: Any) -> bool:
    """Whether no process holds the whole array."""
    return isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated)


def _alone() -> bool:
    """Whether there is nobody to wait for."""
    return process_count() == 1 or _writing.get()


def _run(action: Callable[[], Any]) -> Any:
    """What `action` returns, run while the other processes are elsewhere."""
    token = _writing.set(True)
    try:
        return action()
    finally:
        _writing.reset(token)


def _shared(action: Callable[[], Any], name: str) -> Any:
    """The writer's result of `action`, or its error, on every process."""
    barrier(name)
    outcome, own = None, None
    if is_writer():
        try:
            outcome = {"result": _run(action)}
            json.dumps(outcome)
        # Whatever ends the writer ends the others too, which would wait for it otherwise.
        except BaseException as error:
            outcome, own = {"error": str(error) or repr(error), "refused": isinstance(error, UserError)}, error
    outcome = agree(outcome, f"the result of {name}")
    if own is not None:
        raise own
    if "error" in outcome:
        raise (UserError if outcome["refused"] else RuntimeError)(outcome["error"])
    return outcome["result"]


def _offloaded(leaf: jax.Array) -> OnHost:
    parts = {}
    for shard in leaf.addressable_shards:
        if _place(shard.index) not in parts:
            # Copied, since a numpy view of a CPU array shares memory that a later donation takes away.
            parts[_place(shard.index)] = np.array(shard.data, copy=True)
    return OnHost(leaf.shape, leaf.sharding, parts)


def _place(index: tuple[slice, ...]) -> tuple:
    return tuple((part.start, part.stop, part.step) for part in index)
