"""Conversion of disk errors and Git LFS pointers to UserError."""

import errno
import os
from pathlib import Path

import pytest

from shiq_jax.errors import UserError, check_not_lfs_pointer, disk_errors


def raise_chained(cause, error):
    """Raise `error` from `cause`."""
    try:
        raise cause
    except Exception as exception:
        raise error from exception


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES])
def test_disk_error_becomes_a_one_line_user_error(number):
    with pytest.raises(UserError) as caught, disk_errors():
        raise OSError(number, os.strerror(number), "runs/one/config.json")
    message = str(caught.value)
    assert "runs/one/config.json" in message and os.strerror(number) in message and "\n" not in message


def test_disk_error_is_found_in_the_chain_of_causes():
    with pytest.raises(UserError, match="No space left on device"), disk_errors():
        raise_chained(ValueError("I/O error: No space left on device (os error 28)"), RuntimeError("the save failed"))
    with pytest.raises(UserError, match="runs/one.*No space left on device"), disk_errors(Path("runs/one")):
        raise_chained(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), KeyError("x"))


def test_other_errors_pass_unchanged():
    with pytest.raises(UserError, match="^bad value$"), disk_errors():
        raise_chained(OSError(errno.ENOSPC, "full"), UserError("bad value"))
    with pytest.raises(ConnectionResetError), disk_errors():
        raise ConnectionResetError(errno.ECONNRESET, "reset")
    with pytest.raises(KeyboardInterrupt), disk_errors():
        raise KeyboardInterrupt


def test_disk_errors_as_a_decorator():
    @disk_errors()
    def write(number):
        raise OSError(number, os.strerror(number))

    for _ in range(2):
        with pytest.raises(UserError, match="No space left"):
            write(errno.ENOSPC)


def test_lfs_pointer_is_rejected(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    with pytest.raises(UserError, match="model.safetensors.*Git LFS"):
        check_not_lfs_pointer(file)
    file.write_text("version 2")
    check_not_lfs_pointer(file)
    check_not_lfs_pointer(tmp_path / "missing")
