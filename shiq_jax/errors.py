"""The one exception that the command line turns into a sentence, and what any room may find wrong with a disk."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

# What a disk answers when it is full, over quota, read-only, broken, or not ours to write on.
_DISK = ("ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EIO", "EACCES", "EPERM", "ENOTDIR", "ENAMETOOLONG")
_POINTER = b"version https://git-lfs"
_NUMBERS = {getattr(errno, name) for name in _DISK}


class UserError(ValueError):
    """Input that cannot be used, told in one sentence: what was found, where, what is expected and how to mend it.

    The commands print the sentence and exit with code 2; library callers catch it as the `ValueError` it is.
    """


def check_not_lfs_pointer(path: Path) -> None:
    """UserError when a file is only what Git LFS leaves in the place of a large file that it has not fetched."""
    try:
        with open(path, "rb") as file:
            start = file.read(len(_POINTER))
    except OSError:
        return
    if start == _POINTER:
        raise UserError(
            f"{path}: is a pointer of Git LFS and not the file itself; run `git lfs pull` where it was cloned"
        )


@contextlib.contextmanager
def disk_errors(place: Path | None = None) -> Iterator[None]:
    """Inside, also as a decorator, what a full or unwritable disk raises becomes a UserError.

    The libraries that write checkpoints, weights and tokenizers have exceptions of their own for it, which hold the
    system's words; so the whole chain of causes is looked through.

    place: the directory that is written to, for what is raised without the name of a file.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None:
            if reason := _reason(cause, place):
                raise UserError(
                    f"{reason}: make room or name a place that can be written; what was complete before is as it was, "
                    "and a run that has begun goes on with --resume"
                ) from error
            cause = cause.__cause__ or cause.__context__
        raise


def _reason(error: BaseException, place: Path | None) -> str | None:
    """What the system said and of which file, if the error is a disk's."""
    file, words = f"a file in {place}" if place else "a file", None
    if isinstance(error, OSError) and error.errno in _NUMBERS:
        file, words = error.filename or file, error.strerror
    else:
        words = next((os.strerror(number) for number in _NUMBERS if os.strerror(number) in str(error)), None)
    return f"{file} cannot be written ({words})" if words else None
