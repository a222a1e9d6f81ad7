"""Options of public data in a private run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from shiq_jax.privacy.public_to_private import Reset
from shiq_jax.runs.loss_options import optional_arg


@dataclass(frozen=True)
class Public:
    """Public data in a private run: a public first phase, or public gradients in every update; see docs/privacy.md."""

    data: Annotated[str | None, optional_arg("FILE|HUB_ID", "none: private updates only")] = None
    """Public data, in the format of --data."""
    rule: Literal["switch", "sample", "cosine"] = "switch"
    """Public updates first (switch), or a public gradient in every update, of constant (sample) or growing weight."""
    share: float = 0.1
    """Maximum fraction of public updates (switch), or weight of the public gradient (sample)."""
    stall: Annotated[float | None, optional_arg("NATS", "none: switch after `share` of the updates")] = None
    """Switch once the mean public loss decreases by less than this between consecutive windows of updates."""
    slowdown: Annotated[float | None, optional_arg("FACTOR", "none: switch after `share` of the updates")] = None
    """Switch once the estimated slowdown of a step by noise is at most this factor."""
    window: int = 20
    """Updates per window."""
    reset: Reset = "momentum"
    """Part of Adam's state that is reset at the switch."""
    probes: int = 8
    """Random probe vectors that estimate the curvature of the public loss at every evaluation; 0 disables it."""

    def __post_init__(self):
        if not 0 < self.share < 1:
            raise ValueError(f"share must lie in (0, 1), not {self.share}")
        for name, minimum in (("window", 1), ("probes", 0)):
            if getattr(self, name) < minimum:
                raise ValueError(f"{name} must be at least {minimum}, not {getattr(self, name)}")
        if self.slowdown is not None and not self.slowdown > 1:
            raise ValueError(f"slowdown must be a factor above 1, not {self.slowdown}")
        if self.rule != "switch" and (self.stall is not None or self.slowdown is not None):
            raise ValueError(f"stall and slowdown apply to the rule switch, not to {self.rule}: omit them")
        if self.slowdown is not None and not self.probes:
            raise ValueError("slowdown is estimated with probes: set probes above 0, or omit slowdown")
