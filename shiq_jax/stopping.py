"""Graceful stop: a signal sets a flag, and loops check it at points where no work is lost."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

# Signal handlers are per process, so the requests are global too.
_received: list[int] = []


class Stopped(Exception):
    """The run was stopped by a signal, and can be resumed from its files.

    Args:
        where: completes the sentence "stopped ...".

    Attributes:
        signal: number of the signal.
    """

    def __init__(self, where: str):
        super().__init__(f"stopped {where}")
        self.signal = _received[0] if _received else signal.SIGTERM


@contextlib.contextmanager
def stop_on_signals() -> Iterator[None]:
    """Context in which SIGTERM and the first SIGINT request a stop, and a second SIGINT interrupts immediately.

    The previous handlers are restored on exit. In threads other than the main thread, which cannot install handlers,
    it does nothing. `jax.distributed.initialize` installs its own SIGTERM handler, so enter the context afterwards.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame) -> None:
        if number == signal.SIGINT and signal.SIGINT in _received:
            raise KeyboardInterrupt
        _received.append(number)
        if number == signal.SIGINT:
            # print is not reentrant, and the signal may have interrupted one.
            os.write(2, b"stopping after the current step; interrupt again to stop immediately\n")

    previous = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        _received.clear()


def requested() -> bool:
    """Whether a stop was requested inside `stop_on_signals`."""
    return bool(_received)


def check(where: str) -> None:
    """Raise `Stopped` if a stop was requested.

    Args:
        where: completes the sentence "stopped ...".

    Raises:
        Stopped: a stop was requested.
    """
    if _received:
        raise Stopped(where)
