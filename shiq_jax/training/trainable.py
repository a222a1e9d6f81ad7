"""Add adapters and heads to a model, and select the trainable parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from jax import Array

from shiq_jax.models import Lora, ModelWithHeads, is_adapter
from shiq_jax.models.heads import HEADS
from shiq_jax.objectives import Objective
from shiq_jax.training.state import Params, Path


def add_adapters_and_heads(
    model, params: Params, objective: Objective, *, lora: Lora | None, keys: tuple[Array, Array]
) -> tuple[Any, Params]:
    """The model and its parameters with newly initialized adapters and heads, which leave the policy unchanged.

    Heads that the parameters already have are kept if they match the objective's.

    Args:
        model, params: the initial policy; its arrays are not copied.
        objective: defines the heads.
        lora: the adapters; None adds none.
        keys: random keys of adapters and heads.
    """
    if lora is not None:
        model = dataclasses.replace(model, lora=lora)
        params = model.with_adapters(params, keys[0])
    if objective.heads:
        same_heads = isinstance(model, ModelWithHeads) and dict(model.heads) == dict(objective.heads)
        trained_heads = params.get(HEADS) if same_heads else None
        model = ModelWithHeads.of(model, objective.heads, objective.q_guidance)
        params = model.with_heads(params, keys[1]) if trained_heads is None else params
    return model, params


def trainable_filter(model, objective: Objective) -> Callable[[Path], bool]:
    """Filter of the trainable parameters, for `init_state(trainable=...)`."""
    if not objective.trains_policy:
        return lambda path: path[0] == HEADS
    return lambda path: model.lora is None or path[0] == HEADS or is_adapter(path)
