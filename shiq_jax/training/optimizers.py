"""Optimizers and learning rate schedules by name, built from optax."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
import optax

SCHEDULES = {
    "constant": lambda peak, steps, final: optax.constant_schedule(peak),
    "linear": lambda peak, steps, final: optax.linear_schedule(peak, peak * final, steps),
    "cosine": lambda peak, steps, final: optax.cosine_decay_schedule(peak, steps, final),
}


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """Settings of an optax chain: clip by global norm, then an optimizer with warm-up and decay."""

    name: Literal["adamw", "lion", "adafactor", "sgd"] = "adamw"
    """Name of the optimizer."""
    learning_rate: float = 1e-5
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """Shape of the decay after the warm-up."""
    warmup: float = 0.1
    """Fraction of all steps over which the learning rate rises linearly from 0."""
    final: float = 0.0
    """Final learning rate as a fraction of the peak."""
    weight_decay: float = 0.0
    """Decoupled weight decay (adamw, lion and adafactor)."""
    clip_norm: float = 1.0
    """Maximum global norm of the gradient; 0 disables clipping."""
    b1: float = 0.9
    """Decay rate of the first moment (adamw, lion); momentum (sgd)."""
    b2: float = 0.95
    """Decay rate of the second moment (adamw); of the momentum (lion)."""

    def __post_init__(self):
        for name in ("learning_rate", "weight_decay", "clip_norm"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be at least 0 and finite, not {getattr(self, name)}")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup is a fraction of all steps and must lie in [0, 1), not {self.warmup}")

    def learning_rate_at(self, steps: int) -> optax.Schedule:
        """The learning rate as a function of the step, for a run of `steps` updates."""
        warmup_steps = round(self.warmup * steps)
        decay = SCHEDULES[self.schedule](self.learning_rate, max(steps - warmup_steps, 1), self.final)
        if not warmup_steps:
            return decay
        # Start above 0: a learning rate of 0 would waste the first gradient.
        warmup = optax.linear_schedule(self.learning_rate / (warmup_steps + 1), self.learning_rate, warmup_steps)
        return optax.join_schedules([warmup, decay], [warmup_steps])

    def build(self, steps: int) -> optax.GradientTransformation:
        """The optax transformation for a run of `steps` updates."""
        schedule = self.learning_rate_at(steps)
        optimizers = {
            "adamw": lambda: optax.adamw(schedule, b1=self.b1, b2=self.b2, weight_decay=self.weight_decay),
            "lion": lambda: optax.lion(schedule, b1=self.b1, b2=self.b2, weight_decay=self.weight_decay),
            # optax.adafactor's own weight decay does not follow the learning rate.
            "adafactor": lambda: optax.chain(
                optax.adafactor(schedule), optax.add_decayed_weights(lambda step: -schedule(step) * self.weight_decay)
            ),
            "sgd": lambda: optax.sgd(schedule, momentum=self.b1 or None),
        }
        clip = [clip_by_global_norm(self.clip_norm)] if self.clip_norm else []
        return optax.chain(*clip, optimizers[self.name]())


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """Scale gradients down to global norm `max_norm` if they exceed it.

    Multiplies by one scalar; the elementwise division of `optax.clip_by_global_norm` makes a second copy of the
    gradients.
    """

    def update(updates, state, params=None):
        del params
        scale = max_norm / jnp.maximum(optax.tree.norm(updates), max_norm)
        return jax.tree.map(lambda leaf: leaf * scale.astype(leaf.dtype), updates), state

    return optax.GradientTransformation(optax.init_empty_state, update)
