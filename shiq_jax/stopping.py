"""Stopping a run that is asked to stop: a signal sets a flag, and loops look at it where nothing is lost."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

# Signals belong to the whole process, and so does what they asked for.
_asked: list[int] = []


class Stopped(Exception):
    """A run that ended early because it was asked to; what it left on disk goes on from there.

    Args:
        where: completes the sentence "stopped ...".

    Attributes:
        signal: number of the signal that asked for it.
    """

    def __init__(self, where: str):
        super().__init__(f"stopped {where}")
        self.signal = _asked[0] if _asked else signal.SIGTERM


@contextlib.contextmanager
def on_signals() -> Iterator[None]:
    """Inside, SIGTERM and the first SIGINT ask the run to stop, and a second SIGINT interrupts it at once.

    The handlers that were there before are put back at the end. Only the main thread of a process can have handlers;
    in any other this does nothing. `jax.distributed.initialize` takes SIGTERM for itself, so enter this after it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(number: int, frame) -> None:
        if number == signal.SIGINT and signal.SIGINT in _asked:
            raise KeyboardInterrupt
        _asked.append(number)
        if number == signal.SIGINT:
            # Not print: the signal may have come in the middle of one.
            os.write(2, b"stopping after the step under way; interrupt again to stop at once\n")

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _asked.clear()


def requested() -> bool:
    """Whether the run has been asked to stop; never, unless `on_signals` is entered."""
    return bool(_asked)


def check(where: str) -> None:
    """Stop here if the run has been asked to.

    Args:
        where: completes the sentence "stopped ...".

    Raises:
        Stopped: it has.
    """
    if _asked:
        raise Stopped(where)
