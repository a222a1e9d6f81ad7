"""Options of a private run, and the mechanism built from them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from shiq_jax.privacy import AutoS, AutoV, DropAbove, FlatClip, Groupwise, Mechanism, NormalizedClip, count_groups
from shiq_jax.runs.loss_options import optional_arg

_RULES = {"flat": FlatClip, "auto_s": AutoS, "auto_v": AutoV, "drop_above": DropAbove, "normalized": NormalizedClip}


@dataclass(frozen=True)
class Privacy:
    """Differential privacy of the training data; see docs/privacy.md."""

    epsilon: Annotated[float | None, optional_arg("EPSILON", "none: not private")] = None
    """Privacy budget of the run; calibrates the noise. Setting epsilon or noise_multiplier makes the run private."""
    noise_multiplier: Annotated[float | None, optional_arg("SIGMA", "calibrated to epsilon")] = None
    """Standard deviation of the noise divided by the sensitivity; alternative to epsilon."""
    delta: Annotated[float | None, optional_arg("DELTA", "none: required, below 1 / number of units")] = None
    """Delta of the (epsilon, delta) guarantee."""
    unit: Literal["example", "user"] = "example"
    """Unit of privacy: an example of the objective (trajectory, pair or group), or all rows of one user_id."""
    adjacency: Literal["zero_out", "replace_one"] = "zero_out"
    """Neighboring datasets: one unit is zeroed out, or replaced by another."""
    clip: Literal["auto_s", "auto_v", "flat", "normalized", "drop_above"] = "auto_s"
    """Clipping rule of per-unit gradients."""
    clip_norm: float = 1.0
    """Clip norm C: maximum norm of a clipped gradient; with `normalized`, gradients of norm C or more get norm 1."""
    groupwise: bool = False
    """Clip each parameter of each layer separately: one backward pass instead of two."""
    method: Literal["auto", "ghost", "bk", "scan", "vmap", "group"] = "auto"
    """Algorithm that computes the clipped sum; does not change the result."""
    secret: Annotated[Path | None, optional_arg("FILE", "secret.key in the output directory")] = None
    """File with the root key of sampling and noise, readable by its owner only."""
    insecure_deterministic: bool = False
    """Derive the root key from --seed. Only for tests: anyone who knows the seed can subtract the noise."""
    log_private: bool = False
    """Also log losses and gradient norms of private units. Epsilon does not cover this release."""

    def __post_init__(self):
        for name in ("epsilon", "noise_multiplier", "clip_norm"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be positive and finite, not {value}")
        if self.epsilon is not None and self.noise_multiplier is not None:
            raise ValueError("epsilon and noise_multiplier are mutually exclusive: set only one of them")
        if self.enabled and self.delta is None:
            raise ValueError("a private run needs a delta: set privacy.delta below 1 / number of units")
        if self.delta is not None and not 0 < self.delta < 1:
            raise ValueError(f"delta must lie in (0, 1), not {self.delta}")
        if self.groupwise and self.method not in ("auto", "group"):
            raise ValueError(f"groupwise clipping requires the method group or auto, not {self.method}")

    @property
    def enabled(self) -> bool:
        """Whether the run is private."""
        return self.epsilon is not None or self.noise_multiplier is not None

    def mechanism(
        self, trainable, *, dataset_size: int, expected_batch: int, steps: int, multiple: int, example: str
    ) -> Mechanism:
        """Sampler, noise and accounting of a run; `example` is the unit of the objective."""
        rule = _RULES[self.clip](self.clip_norm)
        settings = dict(
            dataset_size=dataset_size, expected_batch=expected_batch, steps=steps, delta=self.delta,
            clip=Groupwise(rule, count_groups(trainable)) if self.groupwise else rule,
            adjacency=self.adjacency, unit=example if self.unit == "example" else self.unit, multiple=multiple,
        )  # fmt: skip
        if self.epsilon is not None:
            return Mechanism.calibrated(epsilon=self.epsilon, **settings)
        return Mechanism.from_noise_multiplier(noise_multiplier=self.noise_multiplier, **settings)
