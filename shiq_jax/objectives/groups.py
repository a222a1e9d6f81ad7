"""The view of losses on all answers to a prompt."""

from types import MappingProxyType

import jax.numpy as jnp
from jaxtyping import Array

from shiq_jax.objectives.inputs import masked
from shiq_jax.objectives.lift import View
from shiq_jax.objectives.reading import Input, Reading
from shiq_jax.objectives.sequences import LOGRATIO


def _returns(reading: Reading) -> Array:
    return jnp.sum(masked(reading.field("rewards"), reading.mask), axis=-1)


def _real(reading: Reading) -> Array:
    return jnp.any(reading.mask, axis=-1)


def group_metrics(reading: Reading) -> dict[str, Array]:
    """Per sequence: `logratio` and `return`, sums over actions."""
    return {"logratio": reading["logratios"], "return": reading["returns"]}


INPUTS = {"logratios": LOGRATIO, "returns": Input(_returns, ("rewards",)), "real": Input(_real)}

GROUPS = View("group", MappingProxyType(INPUTS), _real, guard=False, metrics=group_metrics)
"""A loss `(logratios [K], returns [K], real [K], *, beta, ...) -> [K]`, 0 for what is not real; the mean over a batch
runs over sequences with at least one action."""
