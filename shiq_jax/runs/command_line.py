"""Shared by the commands: their names, and one sentence with an exit code for every expected failure."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

from shiq_jax.errors import UserError
from shiq_jax.stopping import Stopped


def program(script: str, installed: str) -> str:
    """The name by which the user called the command: `installed` from an installed wheel, else `script`."""
    return installed if Path(sys.argv[0]).stem == installed else script


@contextlib.contextmanager
def one_sentence(program: str, resumes: str) -> Iterator[None]:
    """Turn a UserError into exit code 2 and an interruption into 130, each with one sentence on stderr.

    Args:
        program: name at the beginning of the sentence.
        resumes: says how an interrupted command resumes.
    """
    try:
        yield
    except UserError as refusal:
        print(f"{program}: {refusal}", file=sys.stderr)
        raise SystemExit(2) from None
    except Stopped as stopped:
        print(f"{program}: {stopped}; {resumes}", file=sys.stderr)
        # A scheduler that asked with SIGTERM gets exit code 0; a person's interruption must not look like success.
        if stopped.signal == signal.SIGINT:
            raise SystemExit(130) from None
    except KeyboardInterrupt:
        print(f"{program}: interrupted; {resumes}", file=sys.stderr)
        raise SystemExit(130) from None
