"""One process at a time: a lock on a file, which the kernel lets go of however its process ends."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path

# How file systems say that they know no such locks.
_UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF}


@contextlib.contextmanager
def exclusive(path: Path, *, create: bool = False, waiting: Callable[[], None] | None = None) -> Iterator[bool]:
    """Hold the lock of a file; it may be taken off the disk while it is held.

    Args:
        path: the file; what it holds is left alone.
        create: make the file if it is missing.
        waiting: called once before waiting for another holder; without it there is no waiting.

    Yields:
        True, or False where the file system knows no locks and nothing is held.

    Raises:
        BlockingIOError: another holds the lock, and there is no `waiting`.
        FileNotFoundError: there is no such file.
    """
    while True:
        descriptor = _open(path, os.O_CREAT if create else 0)
        try:
            held = _lock(descriptor, waiting)
            # A holder may have removed the file after it was opened here; its name then means another file, or none.
            if not held or _is(path, descriptor):
                yield held
                return
        finally:
            os.close(descriptor)


def _open(path: Path, flags: int) -> int:
    try:
        # Network file systems give such a lock to those only who may write.
        return os.open(path, os.O_RDWR | flags, 0o666)
    except PermissionError:
        return os.open(path, os.O_RDONLY)


def _lock(descriptor: int, waiting: Callable[[], None] | None) -> bool:
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if waiting is None:
                raise
            waiting()
            fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            return False
        raise
    return True


def _is(path: Path, descriptor: int) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    return False
