"""Differential privacy: per-unit clipping, noise, sampling and what they cost. docs/privacy.md says what is covered."""

from shiq_jax.privacy.clipped_sum import clipped_sum, per_example
from shiq_jax.privacy.mechanism import Mechanism
from shiq_jax.privacy.noise import privatise
from shiq_jax.privacy.rules import Abadi, AutoS, AutoV, ClipRule, Global, Groupwise, count_groups

__all__ = [
    "Abadi",
    "AutoS",
    "AutoV",
    "ClipRule",
    "Global",
    "Groupwise",
    "Mechanism",
    "clipped_sum",
    "count_groups",
    "per_example",
    "privatise",
]
