"""The other libraries: what they need installed, and the settings in which they compete."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent


class Peer(NamedTuple):
    """A library in an environment of its own.

    Attributes:
        name: of the library.
        requirements: what pip installs; exact versions, so that numbers can be made again.
        program: a file of this directory that serves its steps.
        settings: by name, the arguments of its own choice; `{pairs}` stands for the pairs of a step.
        defaults: the name of the setting that its users get without asking.
    """

    name: str
    requirements: tuple[str, ...]
    program: str
    settings: dict[str, tuple[str, ...]]
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
        return [str(self.install(directory)), str(HERE / self.program), *arguments]


def micro(setting: Sequence[str], pairs: int) -> list[str]:
    """A setting's arguments for steps of so many pairs."""
    return [str(pairs) if argument == "{pairs}" else argument for argument in setting]


_TORCH = ("torch==2.13.0", "transformers==5.23.0")

TRL = Peer(
    "trl", ("trl==1.16.0", *_TORCH), "peer_trl.py",
    {
        # Reference beforehand or not, checkpointing or not, pairs of a forward pass.
        "precomputed": ("yes", "no", "{pairs}"),
        "precomputed, one pair at a time": ("yes", "no", "1"),
        "precomputed, checkpointing": ("yes", "yes", "{pairs}"),
        "precomputed, checkpointing, one pair at a time": ("yes", "yes", "1"),
        "defaults": ("no", "yes", "{pairs}"),
    },
    "defaults",
)  # fmt: skip

TUNIX = Peer(
    "tunix", ("google-tunix==0.1.7",), "peer_tunix.py",
    {
        # What is computed again, pairs of a forward pass.
        "defaults": ("none", "{pairs}"),
        "one pair at a time": ("none", "1"),
        "remat decoder": ("decoder", "{pairs}"),
        "remat decoder, one pair at a time": ("decoder", "1"),
    },
    "defaults",
)  # fmt: skip

TRANSFORMERS = Peer("transformers", _TORCH, "peer_generate.py", {"defaults": ()}, "defaults")


def quiet() -> dict[str, str]:
    """Environment of every worker: no network, no chatter."""
    return {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "PYTHONPATH": str(HERE.parent)}
