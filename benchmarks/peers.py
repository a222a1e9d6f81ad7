"""Peer libraries: their pinned requirements, worker programs and benchmark settings."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

BENCHMARKS = Path(__file__).parent


@dataclasses.dataclass(frozen=True, eq=False)
class Peer:
    """A library that is benchmarked in its own virtual environment.

    Attributes:
        name: name of the library.
        requirements: pip requirements with exact versions, for reproducibility.
        program: worker module that serves steps.
        modes: program arguments by mode; the microbatch size is appended.
        defaults: mode with the library's default options.
    """

    name: str
    requirements: tuple[str, ...]
    program: str
    modes: dict[str, tuple[str, ...]]
    defaults: str

    def install(self, directory: Path) -> Path:
        """Create the virtual environment unless it is up to date, and return its Python."""
        home = directory / self.name
        python, marker = home / "bin" / "python", home / "installed"
        requirements = "\n".join(self.requirements)
        if not marker.exists() or marker.read_text() != requirements:
            print(f"installing {self.name} into {home}", file=sys.stderr)
            subprocess.run([sys.executable, "-m", "venv", home], check=True)
            subprocess.run([python, "-m", "pip", "install", "-q", *self.requirements], check=True)
            marker.write_text(requirements)
        return python

    def command(self, directory: Path, arguments: Sequence[str]) -> list[str]:
        """Command line of the worker; installs the library if needed."""
        # With -m and -P, benchmarks/profile.py cannot shadow the standard library's `profile`.
        return [str(self.install(directory)), "-P", "-m", self.program, *arguments]

    def settings(self, microbatch_sizes: Sequence[int], pairs: int) -> Iterator[Setting]:
        """All combinations of mode and microbatch size for steps of `pairs` pairs."""
        for mode in self.modes:
            for size in dict.fromkeys(min(size, pairs) for size in microbatch_sizes):
                yield Setting(self, mode, size)


class Setting(NamedTuple):
    """A peer, its mode and its microbatch size in pairs."""

    peer: Peer
    mode: str
    microbatch_size: int

    @property
    def arguments(self) -> tuple[str, ...]:
        """Program arguments after the model and the workload file."""
        return (*self.peer.modes[self.mode], str(self.microbatch_size))

    def __str__(self) -> str:
        size = self.microbatch_size
        return f"{self.peer.name}, {self.mode}, {size} pair{'s' if size > 1 else ''} at once"


_TORCH = ("torch==2.13.0", "transformers==5.23.0")

TRL = Peer(
    "trl", ("trl==1.16.0", *_TORCH), "benchmarks.peer_trl",
    {
        # Arguments: precompute the reference's log-probabilities; gradient checkpointing.
        "reference beforehand": ("yes", "no"),
        "reference beforehand, checkpointing": ("yes", "yes"),
        "defaults": ("no", "yes"),
    },
    "defaults",
)  # fmt: skip

TUNIX = Peer(
    "tunix", ("google-tunix==0.1.7",), "benchmarks.peer_tunix", {"defaults": ("none",), "remat decoder": ("decoder",)},
    "defaults",
)  # fmt: skip

OPACUS = Peer("opacus", ("opacus==1.6.0", *_TORCH), "benchmarks.peer_opacus", {"ghost": ("ghost",)}, "ghost")

TRANSFORMERS = Peer("transformers", _TORCH, "benchmarks.peer_generate", {"defaults": ()}, "defaults")


def worker_environment() -> dict[str, str]:
    """Environment variables of every worker: offline, errors only."""
    return {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "PYTHONPATH": str(BENCHMARKS.parent)}
