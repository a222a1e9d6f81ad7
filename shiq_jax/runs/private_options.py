"""The options of a private run, and the mechanism that they describe."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from shiq_jax.privacy import AutoS, AutoV, DropAbove, FlatClip, Groupwise, Mechanism, NormalizedClip, count_groups
from shiq_jax.runs.loss_options import given_as

_RULES = {"flat": FlatClip, "auto_s": AutoS, "auto_v": AutoV, "drop_above": DropAbove, "normalized": NormalizedClip}


@dataclass(frozen=True)
class Privacy:
    """Differential privacy of the training data; see docs/privacy.md."""

    epsilon: Annotated[float | None, given_as("EPSILON", "not private")] = None
    """Budget of the whole run, which the noise is calibrated to. This or noise_multiplier makes the run private."""
    noise_multiplier: Annotated[float | None, given_as("SIGMA", "what epsilon asks for")] = None
    """Standard deviation of the noise over the sensitivity, instead of epsilon."""
    delta: Annotated[float | None, given_as("DELTA", "none: give one below 1 / units of data")] = None
    """Delta of the guarantee: the probability with which epsilon may fail."""
    unit: Literal["example", "user"] = "example"
    """Unit of privacy: an example of the objective (trajectory, pair or group), or all rows of one user_id."""
    adjacency: Literal["zero_out", "replace_one"] = "zero_out"
    """Neighbouring data sets differ in one unit, which is zeroed out or replaced by another."""
    clip: Literal["auto_s", "auto_v", "flat", "normalized", "drop_above"] = "auto_s"
    """Rule that scales a unit's gradient."""
    clip_norm: float = 1.0
    """C: largest norm after clipping; with normalized, the norm that is scaled to 1, as are all larger ones."""
    groupwise: bool = False
    """Clip each parameter of each layer by itself: one backward pass instead of two."""
    method: Literal["auto", "ghost", "bk", "scan", "vmap", "group"] = "auto"
    """How clipping is computed; the result is the same."""
    secret: Annotated[Path | None, given_as("FILE", "secret.key in the output directory")] = None
    """File of the root key of sampling and noise, readable by its owner only."""
    insecure_deterministic: bool = False
    """Derive that key from --seed, so that anyone can: for tests, never for private data."""
    log_private: bool = False
    """Also log losses and gradient norms of private units, a release that epsilon does not cover."""

    def __post_init__(self):
        for name in ("epsilon", "noise_multiplier", "clip_norm"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be positive and finite, not {value}")
        if self.epsilon is not None and self.noise_multiplier is not None:
            raise ValueError("epsilon and noise_multiplier say the same: give one of them")
        if self.on and self.delta is None:
            raise ValueError("a private run needs a delta, below 1 over the number of units: give it")
        if self.delta is not None and not 0 < self.delta < 1:
            raise ValueError(f"delta must lie in (0, 1), not {self.delta}")
        if self.groupwise and self.method not in ("auto", "group"):
            raise ValueError(f"groupwise clipping is computed by the method group, not {self.method}")

    @property
    def on(self) -> bool:
        """Whether the run is private."""
        return self.epsilon is not None or self.noise_multiplier is not None

    def mechanism(
        self, trainable, *, dataset_size: int, expected_batch: int, steps: int, multiple: int, example: str
    ) -> Mechanism:
        """Sampler, noise and accounting of a run; `example` is the unit of the objective."""
        rule = _RULES[self.clip](self.clip_norm)
        known = dict(
            dataset_size=dataset_size, expected_batch=expected_batch, steps=steps, delta=self.delta,
            clip=Groupwise(rule, count_groups(trainable)) if self.groupwise else rule,
            adjacency=self.adjacency, unit=example if self.unit == "example" else self.unit, multiple=multiple,
        )  # fmt: skip
        if self.epsilon is not None:
            return Mechanism.calibrated(epsilon=self.epsilon, **known)
        return Mechanism.from_noise_multiplier(noise_multiplier=self.noise_multiplier, **known)
