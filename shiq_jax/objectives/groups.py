"""Objectives on all answers to a prompt out of plain losses of their sums."""

import inspect
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from shiq_jax.objectives.inputs import as_mask, logratios, masked
from shiq_jax.objectives.pairs import BETA, fields, reference_of
from shiq_jax.objectives.types import Example, LossOut, Objective


def groupwise(loss: Callable[..., Array]) -> Objective:
    """The objective on groups of a loss `(logratios [K], returns [K], real [K], *, beta, ...) -> [K]`.

    Its keyword parameters become the objective's options, beta at 0.1 by default. Weight: the sequences with at least
    one action. Metrics per sequence: `logratio` and `return`.
    """
    options = [
        each.replace(default=BETA) if each.name == "beta" else each
        for each in inspect.signature(loss).parameters.values()
        if each.kind is inspect.Parameter.KEYWORD_ONLY
    ]
    name = loss.__name__.removesuffix("_loss")

    def objective(example: Example, **given: Any) -> LossOut:
        policy, action_mask, rewards = fields(example, name, "policy", "action_mask", "rewards")
        mask = as_mask(action_mask)
        real = jnp.any(mask, axis=-1)
        relative = jnp.sum(logratios(policy, reference_of(example, name), mask), axis=-1)
        returns = jnp.sum(masked(rewards, mask), axis=-1)
        value = loss(relative, returns, real, **({"beta": BETA} | given))
        metrics = {"logratio": jnp.sum(relative), "return": jnp.sum(returns)}
        return LossOut(jnp.sum(value), jnp.sum(real).astype(value.dtype), metrics)

    example = inspect.Parameter("example", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=Example)
    objective.__signature__ = inspect.Signature([example, *options], return_annotation=LossOut)
    objective.__name__, objective.__doc__ = name, loss.__doc__
    return Objective(objective, frozenset({"references", "rewards"}), "group")
