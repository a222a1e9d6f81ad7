"""Text that every machine has: source code of the standard library, and of packages that are installed, as bytes."""

from __future__ import annotations

import hashlib
import importlib.util
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from shiq_jax.errors import UserError

# What the project itself needs, so that it is there.
PACKAGES = ("jax", "flax", "optax", "chex", "numpy", "pyarrow", "datasets", "transformers", "matplotlib", "rich")
LENGTH = 64
# One file in so many is held out.
HELD_OUT = 20


class Text(NamedTuple):
    """Sequences of `LENGTH` bytes, none twice; what is held out is of other files. All are uint8[sequences, LENGTH]."""

    public: np.ndarray
    private: np.ndarray
    public_held_out: np.ndarray
    private_held_out: np.ndarray


def load(public: int, private: int, held_out: int, seed: int = 0) -> Text:
    """So many sequences of each, drawn once and for all.

    Raises:
        UserError: there are not so many.
    """
    library = Path(sysconfig.get_paths()["stdlib"])
    own = list(_files(library, skip=("site-packages", "test", "tests", "idlelib", "lib2to3")))
    others = [file for name in PACKAGES for file in _files(_home(name), skip=("tests", "testing"))]
    known: set[bytes] = set()
    pools = [
        _sequences(files, kept, known) for files, kept in ((own, False), (own, True), (others, True), (others, False))
    ]
    rng, found = np.random.default_rng(seed), []
    for pool, wanted in zip(pools, (public, held_out, held_out, private), strict=True):
        if len(pool) < wanted:
            raise UserError(
                f"there are {len(pool)} sequences of source code here, and {wanted} are needed: ask for fewer"
            )
        found.append(pool[np.sort(rng.choice(len(pool), wanted, replace=False))])
    return Text(public=found[0], private=found[3], public_held_out=found[1], private_held_out=found[2])


def _files(home: Path, skip: Sequence[str]) -> Iterator[Path]:
    return (file for file in sorted(home.rglob("*.py")) if not set(file.relative_to(home).parts) & set(skip))


def _home(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"the package {package} is not installed: pip install -e . brings it")
    return Path(spec.submodule_search_locations[0])


def _sequences(files, held_out: bool, known: set[bytes]) -> np.ndarray:
    """The sequences of the files that are held out, or of the others, without those that are `known`, which grows."""
    found = []
    for file in files:
        # By what is in it, so that copies of a file are on one side.
        content = file.read_bytes()
        if (int.from_bytes(hashlib.sha256(content).digest()[:4]) % HELD_OUT == 0) != held_out:
            continue
        for start in range(0, len(content) - LENGTH + 1, LENGTH):
            piece = content[start : start + LENGTH]
            if piece not in known:
                known.add(piece)
                found.append(np.frombuffer(piece, np.uint8))
    return np.stack(found) if found else np.zeros((0, LENGTH), np.uint8)
