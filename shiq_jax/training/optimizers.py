"""Optimisers and schedules by name, optax's but for the clipping."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
import optax

SCHEDULES = {
    "constant": lambda rate, steps, final: optax.constant_schedule(rate),
    "linear": lambda rate, steps, final: optax.linear_schedule(rate, rate * final, steps),
    "cosine": lambda rate, steps, final: optax.cosine_decay_schedule(rate, steps, final),
}


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """An optax chain: clip the gradient's global norm, then the named rule under a warmed-up schedule."""

    name: Literal["adamw", "lion", "adafactor", "sgd"] = "adamw"
    """Rule of the update."""
    learning_rate: float = 1e-5
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """Shape of the decay after the warm-up."""
    warmup: float = 0.1
    """Part of all steps during which the rate rises linearly from 0."""
    final: float = 0.0
    """Last learning rate as a part of the peak."""
    weight_decay: float = 0.0
    """Decoupled weight decay (adamw, lion and adafactor)."""
    clip_norm: float = 1.0
    """Largest global norm of the gradient; 0 clips nothing."""
    b1: float = 0.9
    """Decay of the running mean of gradients; the momentum of sgd (adamw, lion, sgd)."""
    b2: float = 0.95
    """Decay of the running mean of squared gradients (adamw); of the momentum (lion)."""

    def __post_init__(self):
        for name in ("learning_rate", "weight_decay", "clip_norm"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be at least 0 and finite, not {getattr(self, name)}")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup is a part of all steps and must lie in [0, 1), not {self.warmup}")

    def learning_rate_at(self, steps: int) -> optax.Schedule:
        """The learning rate as a function of the step, for a run of `steps` updates."""
        rising = round(self.warmup * steps)
        falling = SCHEDULES[self.schedule](self.learning_rate, max(steps - rising, 1), self.final)
        if not rising:
            return falling
        # Step 0 already moves: a rate of exactly 0 would waste its gradient.
        rise = optax.linear_schedule(self.learning_rate / (rising + 1), self.learning_rate, rising)
        return optax.join_schedules([rise, falling], [rising])

    def build(self, steps: int) -> optax.GradientTransformation:
        """The optax transformation for a run of `steps` updates."""
        rate = self.learning_rate_at(steps)
        rules = {
            "adamw": lambda: optax.adamw(rate, b1=self.b1, b2=self.b2, weight_decay=self.weight_decay),
            "lion": lambda: optax.lion(rate, b1=self.b1, b2=self.b2, weight_decay=self.weight_decay),
            # Adafactor's own decay does not follow the learning rate.
            "adafactor": lambda: optax.chain(
                optax.adafactor(rate), optax.add_decayed_weights(lambda step: -rate(step) * self.weight_decay)
            ),
            "sgd": lambda: optax.sgd(rate, momentum=self.b1 or None),
        }
        clip = [clip_by_global_norm(self.clip_norm)] if self.clip_norm else []
        return optax.chain(*clip, rules[self.name]())


def clip_by_global_norm(most: float) -> optax.GradientTransformation:
    """Gradients whose norm over all leaves exceeds `most`, scaled down to it.

    As `optax.clip_by_global_norm`, by one factor: its quotient for every entry makes a second copy of the gradients.
    """

    def update(updates, state, params=None):
        del params
        factor = most / jnp.maximum(optax.tree.norm(updates), most)
        return jax.tree.map(lambda leaf: leaf * factor.astype(leaf.dtype), updates), state

    return optax.GradientTransformation(optax.init_empty_state, update)
