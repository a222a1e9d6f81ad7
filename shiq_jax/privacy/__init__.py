"""Differential privacy: per-unit clipping, noise, sampling and what they cost. docs/privacy.md says what is covered."""

from shiq_jax.privacy.clipped_sum import clipped_sum, per_example
from shiq_jax.privacy.loss_improvement import Improvement, Landscape, adam_preconditioner, improvement, landscape
from shiq_jax.privacy.mechanism import Mechanism
from shiq_jax.privacy.monitoring import monitored
from shiq_jax.privacy.noise import privatise
from shiq_jax.privacy.phases import adam_memory, affordable, change_over, mixing_weight, stalled
from shiq_jax.privacy.rules import Abadi, AutoS, AutoV, ClipRule, Global, Groupwise, Reparametrised, count_groups
from shiq_jax.privacy.secret import Secret

__all__ = [
    "Abadi",
    "AutoS",
    "AutoV",
    "ClipRule",
    "Global",
    "Groupwise",
    "Improvement",
    "Landscape",
    "Mechanism",
    "Reparametrised",
    "Secret",
    "adam_memory",
    "adam_preconditioner",
    "affordable",
    "change_over",
    "clipped_sum",
    "count_groups",
    "improvement",
    "landscape",
    "mixing_weight",
    "monitored",
    "per_example",
    "privatise",
    "stalled",
]
