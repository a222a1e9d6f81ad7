"""The options of public data in a private run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from shiq_jax.privacy.public_to_private import Reset
from shiq_jax.runs.loss_options import given_as


@dataclass(frozen=True)
class Public:
    """Public data for the first updates of a private run, or for a part of every update; see docs/privacy.md."""

    data: Annotated[str | None, given_as("FILE|HUB_ID", "none: private steps alone")] = None
    """Rows in the format of --data that need no protection."""
    rule: Literal["switch", "sample", "cosine"] = "switch"
    """Public updates first, then private ones; or a public gradient in every update, of constant or growing weight."""
    share: float = 0.1
    """Largest fraction of public updates (switch), or weight of the public gradient (sample)."""
    stall: Annotated[float | None, given_as("NATS", "never: the share decides")] = None
    """Switch as soon as the public loss falls by less than this from one window of updates to the next."""
    slowdown: Annotated[float | None, given_as("FACTOR", "never: the share decides")] = None
    """Switch as soon as an evaluation on public data estimates that noise slows a step down by at most this factor."""
    window: int = 20
    """Updates per window."""
    reset: Reset = "momentum"
    """Part of Adam's state that is reset at the switch."""
    probes: int = 8
    """Random vectors that measure the curvature of the public loss at every evaluation; 0 measures nothing."""

    def __post_init__(self):
        if not 0 < self.share < 1:
            raise ValueError(f"share is a part of all updates and must lie in (0, 1), not {self.share}")
        for name, least in (("window", 1), ("probes", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, not {getattr(self, name)}")
        if self.slowdown is not None and not self.slowdown > 1:
            raise ValueError(f"slowdown is a factor above 1, not {self.slowdown}")
        if self.rule != "switch" and (self.stall is not None or self.slowdown is not None):
            raise ValueError(f"stall and slowdown say when to switch, which {self.rule} does not: leave them out")
        if self.slowdown is not None and not self.probes:
            raise ValueError("slowdown is measured with probes: give some, or leave slowdown out")
