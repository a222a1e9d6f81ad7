"""Worker side of the `workers` protocol; standard library only, because it runs in the peers' environments."""

import json
import sys
import time


def peak_bytes() -> int:
    """Peak resident memory of this process."""
    return _status("VmHWM")


def resident_bytes() -> int:
    """Current resident memory of this process."""
    return _status("VmRSS")


def _status(name: str) -> int:
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith(name))
    return int(line.split()[1]) * 1024


def serve(step, **info) -> None:
    """Report readiness, then run and time `step` once per line of standard input until it closes.

    Args:
        step: runs one step; may return a dict of extra fields for the response.
        **info: properties of the worker, sent once.
    """
    print("ready " + json.dumps(info), flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        extra = step() or {}
        seconds = time.perf_counter() - start
        print("step " + json.dumps({"seconds": seconds, "peak_bytes": peak_bytes(), **extra}), flush=True)
