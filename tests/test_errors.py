"""UserErrors, and what disks and version control leave in the way of a file."""

import errno
import os
from pathlib import Path

import pytest

from shiq_jax.errors import UserError, check_not_lfs_pointer, disk_errors


def raised(*errors):
    """Raises each error while the one before it is handled."""
    first, *others = errors
    if not others:
        raise first
    try:
        raise first
    except Exception as cause:
        raise others[0] from cause


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES])
def test_what_a_disk_answers_becomes_one_sentence(number):
    with pytest.raises(UserError) as told, disk_errors():
        raise OSError(number, os.strerror(number), "runs/one/config.json")
    assert str(told.value).startswith(f"runs/one/config.json cannot be written ({os.strerror(number)}): make room")
    assert "\n" not in str(told.value)


def test_libraries_that_only_pass_the_words_on_are_understood():
    with (
        pytest.raises(UserError, match=r"^a file cannot be written \(No space left on device\): make room"),
        disk_errors(),
    ):
        raised(ValueError("I/O error: No space left on device (os error 28)"), RuntimeError("the save failed"))
    with (
        pytest.raises(UserError, match=r"^a file in runs/one cannot be written \(No space"),
        disk_errors(Path("runs/one")),
    ):
        raised(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), KeyError("x"))


def test_other_errors_pass_as_they_are():
    with pytest.raises(UserError, match="^mine$"), disk_errors():
        raised(OSError(errno.ENOSPC, "full"), UserError("mine"))
    with pytest.raises(ConnectionResetError), disk_errors():
        raise ConnectionResetError(errno.ECONNRESET, "reset")
    with pytest.raises(KeyboardInterrupt), disk_errors():
        raise KeyboardInterrupt


def test_it_decorates_as_well():
    @disk_errors()
    def write(number):
        raise OSError(number, os.strerror(number))

    for _ in range(2):
        with pytest.raises(UserError, match="No space left"):
            write(errno.ENOSPC)


def test_a_pointer_is_not_the_file(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    with pytest.raises(UserError, match="model.safetensors: is a Git LFS pointer"):
        check_not_lfs_pointer(file)
    file.write_text("version 2")
    check_not_lfs_pointer(file)
    check_not_lfs_pointer(tmp_path / "missing")
