"""View of losses on all answers to a prompt."""

from types import MappingProxyType

import jax.numpy as jnp
from jaxtyping import Array

from shiq_jax.objectives.lift import ExampleView
from shiq_jax.objectives.loss_inputs import LossInput, LossInputs
from shiq_jax.objectives.sequences import LOGRATIO
from shiq_jax.objectives.validation import masked


def _returns(inputs: LossInputs) -> Array:
    return jnp.sum(masked(inputs.field("rewards"), inputs.mask), axis=-1)


def _has_actions(inputs: LossInputs) -> Array:
    return jnp.any(inputs.mask, axis=-1)


def group_metrics(inputs: LossInputs) -> dict[str, Array]:
    """Per sequence: `logratio` and `return`, summed over actions."""
    return {"logratio": inputs["logratios"], "return": inputs["returns"]}


INPUTS = {"logratios": LOGRATIO, "returns": LossInput(_returns, ("rewards",)), "real": LossInput(_has_actions)}

GROUPS = ExampleView("group", MappingProxyType(INPUTS), _has_actions, mask_invalid=False, metrics=group_metrics)
"""A loss `(logratios [K], returns [K], real [K], *, beta, ...) -> [K]` that is 0 where `real`, the mask of the answers
with at least one action, is False; averaged over these answers."""
