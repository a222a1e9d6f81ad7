"""The other libraries: what they need installed, and the settings in which they compete."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent


@dataclasses.dataclass(frozen=True, eq=False)
class Peer:
    """A library in an environment of its own.

    Attributes:
        name: of the library.
        requirements: what pip installs; exact versions, so that numbers can be made again.
        program: a module that serves its steps.
        modes: by name, the program's arguments before the pairs that are computed at once.
        defaults: the mode that its users get without asking.
    """

    name: str
    requirements: tuple[str, ...]
    program: str
    modes: dict[str, tuple[str, ...]]
    defaults: str

    def install(self, directory: Path) -> Path:
        """Its Python; the environment is made when it is not there."""
        home = directory / self.name
        python, done = home / "bin" / "python", home / "installed"
        wanted = "\n".join(self.requirements)
        if not done.exists() or done.read_text() != wanted:
            print(f"installing {self.name} into {home}", file=sys.stderr)
            subprocess.run([sys.executable, "-m", "venv", home], check=True)
            subprocess.run([python, "-m", "pip", "install", "-q", *self.requirements], check=True)
            done.write_text(wanted)
        return python

    def command(self, directory: Path, arguments: Sequence[str]) -> list[str]:
        """What starts its worker."""
        # As a module: a script's own directory would come before the standard library, whose names ours may have.
        return [str(self.install(directory)), "-P", "-m", self.program, *arguments]

    def settings(self, at_once: Sequence[int], pairs: int) -> Iterator[Setting]:
        """All modes, with so many pairs of a step of `pairs` at once; the defaults take the whole step."""
        for mode in self.modes:
            for size in dict.fromkeys(min(size, pairs) for size in at_once):
                yield Setting(self, mode, size)


class Setting(NamedTuple):
    """A peer with its own choices."""

    peer: Peer
    mode: str
    at_once: int

    @property
    def arguments(self) -> tuple[str, ...]:
        """The program's, after the model and the work."""
        return (*self.peer.modes[self.mode], str(self.at_once))

    def __str__(self) -> str:
        return f"{self.peer.name}, {self.mode}, {self.at_once} pair{'s' if self.at_once > 1 else ''} at once"


_TORCH = ("torch==2.13.0", "transformers==5.23.0")

TRL = Peer(
    "trl", ("trl==1.16.0", *_TORCH), "benchmarks.peer_trl",
    {
        # The reference's log-probabilities beforehand or not, gradient checkpointing or not.
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


def quiet() -> dict[str, str]:
    """Environment of every worker: no network, no chatter."""
    return {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "PYTHONPATH": str(HERE.parent)}
