"""Differential privacy: per-unit clipping, Poisson sampling, Gaussian noise and accounting; see docs/privacy.md."""

from shiq_jax.privacy.clip_rules import (
    AutoS,
    AutoV,
    ClipRule,
    DropAbove,
    FlatClip,
    Groupwise,
    NormalizedClip,
    count_groups,
)
from shiq_jax.privacy.clipped_sum import clipped_sum, per_example
from shiq_jax.privacy.loss_improvement import Improvement, Landscape, adam_preconditioner, improvement, landscape
from shiq_jax.privacy.mechanism import Mechanism
from shiq_jax.privacy.monitoring import improvement_metrics
from shiq_jax.privacy.noise import privatize
from shiq_jax.privacy.public_to_private import (
    adam_state,
    has_plateaued,
    mixing_weight,
    noise_is_affordable,
    reset_optimizer,
)
from shiq_jax.privacy.secret import Secret

__all__ = [
    "AutoS",
    "AutoV",
    "ClipRule",
    "DropAbove",
    "FlatClip",
    "Groupwise",
    "Improvement",
    "Landscape",
    "Mechanism",
    "NormalizedClip",
    "Secret",
    "adam_preconditioner",
    "adam_state",
    "clipped_sum",
    "count_groups",
    "has_plateaued",
    "improvement",
    "improvement_metrics",
    "landscape",
    "mixing_weight",
    "noise_is_affordable",
    "per_example",
    "privatize",
    "reset_optimizer",
]
