"""Clip rules: by how much a unit's gradient of a given norm is scaled, and what that bounds."""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
from jaxtyping import Array, Float

# Norms below this are taken for it, where a rule would divide by them.
SMALLEST = 1e-12


@dataclasses.dataclass(frozen=True)
class ClipRule:
    """A rule maps norms [rows] to factors [rows]; scaled by them, no gradient is longer than `sensitivity`.

    `sensitivity` is that of a sum over units when one is added, removed or set to zero, and half of what replacing one
    can do. Factors are finite for every norm.

    Attributes:
        clip_norm: C, the longest that a gradient may be afterwards where the rule says nothing else, > 0.
    """

    clip_norm: float = 1.0

    def __post_init__(self):
        if not 0 < self.clip_norm < math.inf:
            raise ValueError(f"clip_norm must be positive and finite, not {self.clip_norm}")

    @property
    def sensitivity(self) -> float:
        """How far one unit moves the sum, in L2 norm."""
        return self.clip_norm

    def per_group(self, groups: int) -> ClipRule:
        """The rule for one of so many groups of parameters: with this rule's sensitivity over sqrt(groups)."""
        return dataclasses.replace(self, clip_norm=self.clip_norm / math.sqrt(groups))

    def __call__(self, norms: Float[Array, " rows"]) -> Float[Array, " rows"]:
        """The factors."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class FlatClip(ClipRule):
    """min(1, C / norm): longer gradients are shortened, others left. Source: arXiv 1607.00133."""

    def __call__(self, norms):
        return jnp.minimum(1, self.clip_norm / jnp.maximum(norms, SMALLEST))


@dataclasses.dataclass(frozen=True)
class NormalizedClip(ClipRule):
    """min(1 / C, 1 / norm): Abadi's factor over C, so that steps stay as long when C changes. Source: arXiv 2204.13650.

    Attributes:
        clip_norm: C, the norm above which gradients are shortened, > 0.
        longest: how long a gradient may be afterwards, whatever C; of G groups it is 1 / sqrt(G) for each, which are
            shortened above C / sqrt(G).
    """

    longest: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.longest < math.inf:
            raise ValueError(f"longest must be positive and finite, not {self.longest}")

    @property
    def sensitivity(self) -> float:
        """How far one unit moves the sum, in L2 norm."""
        return self.longest

    def per_group(self, groups: int) -> NormalizedClip:
        """The rule for one of so many groups of parameters; gradients within C / sqrt(groups) keep the factor 1 / C."""
        return dataclasses.replace(self, longest=self.longest / math.sqrt(groups))

    def __call__(self, norms):
        return jnp.minimum(1 / self.clip_norm, self.longest / jnp.maximum(norms, SMALLEST))


@dataclasses.dataclass(frozen=True)
class AutoV(ClipRule):
    """C / norm: all gradients have one length. Source: arXiv 2206.07136."""

    def __call__(self, norms):
        return self.clip_norm / jnp.maximum(norms, SMALLEST)


@dataclasses.dataclass(frozen=True)
class AutoS(ClipRule):
    """C / (norm + stability): nearly one length, but small gradients stay small. Source: arXiv 2206.07136.

    Attributes:
        numerical_stability: the norm at which a gradient is scaled to half of C, > 0.
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
    """1 where norm <= C and 0 elsewhere: longer gradients are dropped. Source: arXiv 2206.07136, section 2."""

    def __call__(self, norms):
        return (norms <= self.clip_norm).astype(norms.dtype)


@dataclasses.dataclass(frozen=True)
class Groupwise:
    """Another rule applied to each group of parameters by itself; a group is one parameter of one layer.

    With a rule that bounds by C and G groups each group is bounded by C / sqrt(G), so that the whole is by C. The two
    uses of a tied table are bounded by half of that each, for the norm of their sum is at most the sum of theirs.
    Source: arXiv 2212.01539.

    Attributes:
        rule: of each group, its `sensitivity` being that of the whole.
        groups: G, see `count_groups`.
    """

    rule: ClipRule
    groups: int

    def __post_init__(self):
        if self.groups < 1:
            raise ValueError(f"groups must be at least 1, not {self.groups}")

    @property
    def sensitivity(self) -> float:
        """How far one unit moves the sum, in L2 norm: as far as all groups together."""
        return math.sqrt(self.groups) * self.per_group.sensitivity

    @property
    def per_group(self) -> ClipRule:
        """The rule by which each group is clipped."""
        return self.rule.per_group(self.groups)


def count_groups(params, stacked: str = "layers") -> int:
    """Groups of a nested dict of parameters: those below `stacked` have a leading axis of layers."""

    def count(tree, layered: bool) -> int:
        if not hasattr(tree, "items"):
            return tree.shape[0] if layered else 1
        return sum(count(part, layered or name == stacked) for name, part in tree.items())

    return count(params, False)
