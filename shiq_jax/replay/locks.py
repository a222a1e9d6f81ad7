"""Exclusive file locks, which the kernel releases even if the process is killed."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path

# Errors of file systems that do not support flock.
_UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF}


@contextlib.contextmanager
def exclusive_lock(path: Path, *, create: bool = False, on_wait: Callable[[], None] | None = None) -> Iterator[bool]:
    """Hold an exclusive lock on a file.

    The file may be deleted while the lock is held; the next holder then locks the file that replaces it.

    Args:
        path: the file; its contents are not changed.
        create: create the file if it is missing.
        on_wait: called once before waiting for another holder; None raises BlockingIOError instead of waiting.

    Yields:
        True, or False if the file system does not support locks and none is held.

    Raises:
        BlockingIOError: the lock is held elsewhere and `on_wait` is None.
        FileNotFoundError: the file does not exist and `create` is False.
    """
    while True:
        descriptor = _open(path, os.O_CREAT if create else 0)
        try:
            held = _lock(descriptor, on_wait)
            # The previous holder may have deleted the file after it was opened here; then lock its replacement.
            if not held or _is_current(path, descriptor):
                yield held
                return
        finally:
            os.close(descriptor)


def _open(path: Path, flags: int) -> int:
    try:
        # NFS grants exclusive locks only on descriptors that are open for writing.
        return os.open(path, os.O_RDWR | flags, 0o666)
    except PermissionError:
        return os.open(path, os.O_RDONLY)


def _lock(descriptor: int, on_wait: Callable[[], None] | None) -> bool:
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if on_wait is None:
                raise
            on_wait()
            fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            return False
        raise
    return True


def _is_current(path: Path, descriptor: int) -> bool:
    """Whether `path` still names the open file."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    return False
