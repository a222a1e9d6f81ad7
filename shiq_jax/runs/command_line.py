"""Command names and error reporting, shared by `train.py` and `eval.py`."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

from shiq_jax.errors import UserError
from shiq_jax.stopping import Stopped


def program_name(script: str, installed: str) -> str:
    """The name under which the user called the command: `installed` from an installed wheel, else `script`."""
    return installed if Path(sys.argv[0]).stem == installed else script


@contextlib.contextmanager
def report_errors(program: str, hint: str) -> Iterator[None]:
    """Print expected failures as one sentence on stderr: UserError exits with code 2, an interruption with 130.

    Args:
        program: prefix of the message.
        hint: how to resume an interrupted command.
    """
    try:
        yield
    except UserError as error:
        print(f"{program}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except Stopped as stopped:
        print(f"{program}: {stopped}; {hint}", file=sys.stderr)
        # SIGTERM from a scheduler exits with 0; Ctrl-C must not look like success.
        if stopped.signal == signal.SIGINT:
            raise SystemExit(130) from None
    except KeyboardInterrupt:
        print(f"{program}: interrupted; {hint}", file=sys.stderr)
        raise SystemExit(130) from None
