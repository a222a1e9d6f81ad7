"""The view of losses on all answers to a prompt."""

from types import MappingProxyType

import jax.numpy as jnp
from jaxtyping import Array

from shiq_jax.objectives.lift import ExampleView
from shiq_jax.objectives.loss_inputs import LossInput, LossInputs
from shiq_jax.objectives.sequences import LOGRATIO
from shiq_jax.objectives.validation import masked


def _returns(reading: LossInputs) -> Array:
    return jnp.sum(masked(reading.field("rewards"), reading.mask), axis=-1)


def _real(reading: LossInputs) -> Array:
    return jnp.any(reading.mask, axis=-1)


def group_metrics(reading: LossInputs) -> dict[str, Array]:
    """Per sequence: `logratio` and `return`, sums over actions."""
    return {"logratio": reading["logratios"], "return": reading["returns"]}


INPUTS = {"logratios": LOGRATIO, "returns": LossInput(_returns, ("rewards",)), "real": LossInput(_real)}

GROUPS = ExampleView("group", MappingProxyType(INPUTS), _real, guard=False, metrics=group_metrics)
"""A loss `(logratios [K], returns [K], real [K], *, beta, ...) -> [K]`, 0 for what is not real; the mean over a batch
runs over sequences with at least one action."""
