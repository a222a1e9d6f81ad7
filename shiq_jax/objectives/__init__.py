"""Losses of post-training as pure functions of token statistics; needs only jax, numpy and jaxtyping."""

from shiq_jax.objectives.preference import dpo_loss
from shiq_jax.objectives.registry import OBJECTIVES
from shiq_jax.objectives.residuals import bellman_residuals, shiq_loss, squared_residuals
from shiq_jax.objectives.statistics import token_stats, token_stats_from_logits
from shiq_jax.objectives.supervised import sft_loss
from shiq_jax.objectives.types import Couple, Example, LossOut, Objective, TokenStats

__all__ = [
    "OBJECTIVES",
    "Couple",
    "Example",
    "LossOut",
    "Objective",
    "TokenStats",
    "bellman_residuals",
    "dpo_loss",
    "sft_loss",
    "shiq_loss",
    "squared_residuals",
    "token_stats",
    "token_stats_from_logits",
]
