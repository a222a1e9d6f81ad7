"""Byte sequences of Python source code: the standard library (public) and installed packages (private)."""

from __future__ import annotations

import hashlib
import importlib.util
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from shiq_jax.errors import UserError

# Dependencies of this project, which are always installed.
PACKAGES = ("jax", "flax", "optax", "chex", "numpy", "pyarrow", "datasets", "transformers", "matplotlib", "rich")
LENGTH = 64
# One file in 20 is held out.
HELD_OUT = 20


class Text(NamedTuple):
    """Distinct sequences, uint8[sequences, LENGTH]; held-out sequences come from held-out files."""

    public: np.ndarray
    private: np.ndarray
    public_held_out: np.ndarray
    private_held_out: np.ndarray


def load(public: int, private: int, held_out: int, seed: int = 0) -> Text:
    """Draw random sequences without replacement.

    Args:
        public: number of public sequences.
        private: number of private sequences.
        held_out: number of held-out sequences of each kind.
        seed: random seed.

    Raises:
        UserError: the installed source code has too few sequences.
    """
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    stdlib_files = list(_python_files(stdlib, skip=("site-packages", "test", "tests", "idlelib", "lib2to3")))
    package_files = [
        file for name in PACKAGES for file in _python_files(_package_root(name), skip=("tests", "testing"))
    ]
    seen: set[bytes] = set()
    pools = [
        _sequences(files, is_held_out, seen)
        for files, is_held_out in (
            (stdlib_files, False), (stdlib_files, True), (package_files, True), (package_files, False)
        )
    ]  # fmt: skip
    rng, parts = np.random.default_rng(seed), []
    for pool, count in zip(pools, (public, held_out, held_out, private), strict=True):
        if len(pool) < count:
            raise UserError(f"found {len(pool)} sequences of source code, need {count}: request fewer")
        parts.append(pool[np.sort(rng.choice(len(pool), count, replace=False))])
    return Text(public=parts[0], private=parts[3], public_held_out=parts[1], private_held_out=parts[2])


def _python_files(root: Path, skip: Sequence[str]) -> Iterator[Path]:
    return (file for file in sorted(root.rglob("*.py")) if not set(file.relative_to(root).parts) & set(skip))


def _package_root(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"package {package} is not installed: run pip install -e .")
    return Path(spec.submodule_search_locations[0])


def _sequences(files, held_out: bool, seen: set[bytes]) -> np.ndarray:
    """Sequences of the held-out files, or of the rest, that are not in `seen`; adds them to `seen`."""
    sequences = []
    for file in files:
        # Split by the content hash, so that copies of a file are on the same side.
        content = file.read_bytes()
        if (int.from_bytes(hashlib.sha256(content).digest()[:4]) % HELD_OUT == 0) != held_out:
            continue
        for start in range(0, len(content) - LENGTH + 1, LENGTH):
            piece = content[start : start + LENGTH]
            if piece not in seen:
                seen.add(piece)
                sequences.append(np.frombuffer(piece, np.uint8))
    return np.stack(sequences) if sequences else np.zeros((0, LENGTH), np.uint8)
