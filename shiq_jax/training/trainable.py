"""What learns, made out of the reference: its adapters or all of it, and the heads that a loss wants beside it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from jax import Array

from shiq_jax.models import Lora, ModelWithHeads, is_adapter
from shiq_jax.models.heads import HEADS
from shiq_jax.objectives import Objective
from shiq_jax.training.state import Params, Path


def add_trainable_parts(
    model, params: Params, objective: Objective, *, lora: Lora | None, keys: tuple[Array, Array]
) -> tuple[Any, Params]:
    """The model and its parameters with fresh adapters and heads, with which it is still the same policy.

    Args:
        model, params: the reference; no array of it is copied.
        objective: says which heads there are.
        lora: the adapters, None for none.
        keys: jax random keys of adapters and heads.
    """
    if lora is not None:
        model = dataclasses.replace(model, lora=lora)
        params = model.with_adapters(params, keys[0])
    if objective.heads:
        learned = (
            params.get(HEADS)
            if isinstance(model, ModelWithHeads) and dict(model.heads) == dict(objective.heads)
            else None
        )
        model = ModelWithHeads.of(model, objective.heads, objective.q_guidance)
        # A policy that has learned these heads before goes on with them.
        params = model.with_heads(params, keys[1]) if learned is None else params
    return model, params


def trainable_filter(model, objective: Objective) -> Callable[[Path], bool]:
    """Which parameters of a `learner` are updated, as `init_state` is told."""
    if not objective.trains_policy:
        return lambda path: path[0] == HEADS
    return lambda path: model.lora is None or path[0] == HEADS or is_adapter(path)
