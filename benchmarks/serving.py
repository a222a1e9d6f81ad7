"""The worker's side of `workers`: imported by programs in other environments, so it needs Python alone."""

import json
import sys
import time


def peak_bytes() -> int:
    """The most memory that this process has had resident."""
    return _status("VmHWM")


def resident_bytes() -> int:
    """The memory that this process has resident now."""
    return _status("VmRSS")


def _status(name: str) -> int:
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith(name))
    return int(line.split()[1]) * 1024


def serve(step, **about) -> None:
    """Says that it is ready, then calls `step` whenever it is asked to, until its input ends.

    What `step` returns, if anything, is a dict that goes into the answer.
    """
    out = sys.stdout
    print("ready " + json.dumps(about), file=out, flush=True)
    for _ in sys.stdin:
        answer(step, out)


def answer(step, out=sys.stdout) -> None:
    """One step, timed."""
    began = time.perf_counter()
    more = step() or {}
    seconds = time.perf_counter() - began
    print("step " + json.dumps({"seconds": seconds, "peak_bytes": peak_bytes(), **more}), file=out, flush=True)
