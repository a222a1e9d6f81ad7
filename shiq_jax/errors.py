"""`UserError`, which the commands print without a traceback, and helpers that raise it for file and disk errors."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

# Errors of full, read-only, failing or inaccessible disks.
_DISK_ERRORS = ("ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EIO", "EACCES", "EPERM", "ENOTDIR", "ENAMETOOLONG")
_DISK_ERRNOS = {getattr(errno, name) for name in _DISK_ERRORS}
_LFS_HEADER = b"version https://git-lfs"


class UserError(ValueError):
    """Invalid user input; the message states what was found and where, what is expected and how to fix it.

    The commands print the message and exit with code 2; library callers can catch it as a `ValueError`.
    """


def check_not_lfs_pointer(path: Path) -> None:
    """Raise UserError if the file is a Git LFS pointer whose content has not been fetched."""
    try:
        with open(path, "rb") as file:
            start = file.read(len(_LFS_HEADER))
    except OSError:
        return
    if start == _LFS_HEADER:
        raise UserError(f"{path}: is a Git LFS pointer, not the file itself; run `git lfs pull` in its repository")


@contextlib.contextmanager
def disk_errors(directory: Path | None = None) -> Iterator[None]:
    """Context manager and decorator that turns errors of a full or unwritable disk into UserErrors.

    Libraries that write checkpoints, weights and tokenizers wrap the system's error in exceptions of their own, so the
    whole chain of causes is searched.

    directory: the directory that is written to, for errors that do not name a file.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None:
            if reason := _disk_error_message(cause, directory):
                raise UserError(
                    f"{reason}: make room or choose a writable path; completed files are intact, and --resume "
                    "continues an interrupted run"
                ) from error
            cause = cause.__cause__ or cause.__context__
        raise


def _disk_error_message(error: BaseException, directory: Path | None) -> str | None:
    """The file and the system's message if this is a disk error, else None."""
    file, message = f"a file in {directory}" if directory else "a file", None
    if isinstance(error, OSError) and error.errno in _DISK_ERRNOS:
        file, message = error.filename or file, error.strerror
    else:
        message = next((os.strerror(number) for number in _DISK_ERRNOS if os.strerror(number) in str(error)), None)
    return f"{file} cannot be written ({message})" if message else None
