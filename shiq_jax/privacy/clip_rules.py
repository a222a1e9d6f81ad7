"""Clip rules: the factor that scales a per-example gradient, given its norm, and the sensitivity that results."""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
from jaxtyping import Array, Float

# Floor for norms in denominators.
MIN_NORM = 1e-12


@dataclasses.dataclass(frozen=True)
class ClipRule:
    """Base class of clip rules, which map norms [rows] to finite factors [rows].

    No scaled gradient has a norm above `sensitivity`. That is the L2 sensitivity of the sum when a unit is added,
    removed or zeroed out; replacing a unit moves the sum by up to twice as much.

    Attributes:
        clip_norm: C, the clip norm, > 0; by default also the sensitivity.
    """

    clip_norm: float = 1.0

    def __post_init__(self):
        if not 0 < self.clip_norm < math.inf:
            raise ValueError(f"clip_norm must be positive and finite, not {self.clip_norm}")

    @property
    def sensitivity(self) -> float:
        """L2 sensitivity of the sum of scaled gradients to one unit."""
        return self.clip_norm

    def per_group(self, groups: int) -> ClipRule:
        """The rule for one of `groups` parameter groups; its sensitivity is smaller by a factor sqrt(groups)."""
        return dataclasses.replace(self, clip_norm=self.clip_norm / math.sqrt(groups))

    def __call__(self, norms: Float[Array, " rows"]) -> Float[Array, " rows"]:
        """Scaling factors for gradients with these norms."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class FlatClip(ClipRule):
    """min(1, C / norm): clip the gradient to norm C. Source: arXiv 1607.00133."""

    def __call__(self, norms):
        return jnp.minimum(1, self.clip_norm / jnp.maximum(norms, MIN_NORM))


@dataclasses.dataclass(frozen=True)
class NormalizedClip(ClipRule):
    """min(1 / C, 1 / norm): `FlatClip` divided by C, which decouples C from the learning rate.

    Source: arXiv 2204.13650.

    Attributes:
        clip_norm: C, the norm above which gradients are clipped, > 0.
        max_norm: largest norm after clipping, for any C, > 0. With G groups, each is clipped above C / sqrt(G) and
            has a norm of at most max_norm / sqrt(G) afterwards.
    """

    max_norm: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.max_norm < math.inf:
            raise ValueError(f"max_norm must be positive and finite, not {self.max_norm}")

    @property
    def sensitivity(self) -> float:
        """L2 sensitivity of the sum of scaled gradients to one unit."""
        return self.max_norm

    def per_group(self, groups: int) -> NormalizedClip:
        """The rule for one of `groups` parameter groups; gradients below C / sqrt(groups) keep the factor 1 / C."""
        return dataclasses.replace(self, max_norm=self.max_norm / math.sqrt(groups))

    def __call__(self, norms):
        return jnp.minimum(1 / self.clip_norm, self.max_norm / jnp.maximum(norms, MIN_NORM))


@dataclasses.dataclass(frozen=True)
class AutoV(ClipRule):
    """C / norm: normalize every gradient to norm C. Source: arXiv 2206.07136."""

    def __call__(self, norms):
        return self.clip_norm / jnp.maximum(norms, MIN_NORM)


@dataclasses.dataclass(frozen=True)
class AutoS(ClipRule):
    """C / (norm + stability): normalize to a norm near C, but keep small gradients small. Source: arXiv 2206.07136.

    Attributes:
        numerical_stability: the norm at which a gradient is scaled to C / 2, > 0.
    """

    numerical_stability: float = 0.01

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.numerical_stability < math.inf:
            raise ValueError(f"numerical_stability must be positive and finite, not {self.numerical_stability}")

    def __call__(self, norms):
        return self.clip_norm / (norms + self.numerical_stability)


@dataclasses.dataclass(frozen=True)
class DropAbove(ClipRule):
    """1 if norm <= C, else 0: drop gradients with larger norms. Source: arXiv 2206.07136, section 2."""

    def __call__(self, norms):
        return (norms <= self.clip_norm).astype(norms.dtype)


@dataclasses.dataclass(frozen=True)
class Groupwise:
    """Group-wise clipping: apply a rule separately to each parameter of each layer. Source: arXiv 2212.01539.

    With clip norm C and G groups, each group is clipped to C / sqrt(G), so the whole gradient has norm C at most. The
    two uses of a tied table (lookup and head) form one group; each is clipped to half of the group's norm, because the
    norm of their sum is at most the sum of their norms.

    Attributes:
        rule: the rule for the whole gradient; `group_rule` is derived from it.
        groups: G, see `count_groups`.
    """

    rule: ClipRule
    groups: int

    def __post_init__(self):
        if self.groups < 1:
            raise ValueError(f"groups must be at least 1, not {self.groups}")

    @property
    def sensitivity(self) -> float:
        """L2 sensitivity of the sum of scaled gradients to one unit, over all groups."""
        return math.sqrt(self.groups) * self.group_rule.sensitivity

    @property
    def group_rule(self) -> ClipRule:
        """The rule that clips each group."""
        return self.rule.per_group(self.groups)


def count_groups(params, stacked: str = "layers") -> int:
    """Number of parameter groups in a nested dict; each leaf below `stacked` counts once per layer (leading axis)."""

    def count(tree, layered: bool) -> int:
        if not hasattr(tree, "items"):
            return tree.shape[0] if layered else 1
        return sum(count(subtree, layered or name == stacked) for name, subtree in tree.items())

    return count(params, False)
