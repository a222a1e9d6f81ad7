"""Views of losses on pairs: sequence 0 is the chosen, sequence 1 the rejected completion."""

from collections.abc import Callable
from functools import partial
from types import MappingProxyType

import jax.numpy as jnp
from jaxtyping import Array

from shiq_jax.objectives.lift import ExampleView
from shiq_jax.objectives.loss_inputs import LossInput, LossInputs
from shiq_jax.objectives.pair_options import divergence_scores, read_pair_options, shared_pair_options, sum_over_actions
from shiq_jax.objectives.validation import logratios, masked


def _logp(inputs: LossInputs) -> Array:
    return sum_over_actions(masked(inputs.field("policy").logp, inputs.mask), inputs)


def _logratio(inputs: LossInputs) -> Array:
    return sum_over_actions(logratios(inputs.field("policy"), inputs.reference(), inputs.mask), inputs)


def _length(inputs: LossInputs) -> Array:
    return jnp.sum(inputs.mask, axis=-1)


def _return(inputs: LossInputs) -> Array:
    return jnp.sum(masked(inputs.field("rewards"), inputs.mask), -1)


def _select(index: int, quantity: str, inputs: LossInputs) -> Array:
    return inputs[quantity][index]


def _select_score(index: int, quantity: str, inputs: LossInputs) -> Array:
    return divergence_scores(inputs[quantity][index], inputs)


def _chosen_and_rejected(quantity: str, *needs: str, select: Callable = _select) -> dict[str, LossInput]:
    sides = enumerate(("chosen", "rejected"))
    return {f"{side}_{quantity}": LossInput(partial(select, index, quantity), needs) for index, side in sides}


LOSS_INPUTS = {
    **_chosen_and_rejected("logratio", "policy", "references", select=_select_score),
    **_chosen_and_rejected("logp", "policy"),
    **_chosen_and_rejected("length"),
    **_chosen_and_rejected("return", "rewards"),
    # All couplings of pairs compare with the reference.
    "coupled": LossInput(lambda inputs: inputs.field("coupled"), ("policy", "references")),
}
"""Sums over the actions of the chosen and the rejected completion, their numbers of actions, and `coupled`."""

INPUTS = LOSS_INPUTS | {
    "pair_options": LossInput(read_pair_options),
    "logratio": LossInput(_logratio, ("policy", "references")),
    "logp": LossInput(_logp, ("policy",)),
    "length": LossInput(_length),
    "return": LossInput(_return, ("rewards",)),
}
"""`LOSS_INPUTS`, the same sums of both completions as [2], and the shared options."""


def both_have_actions(inputs: LossInputs) -> Array:
    """Whether both completions have at least one action."""
    return (inputs["length"][0] > 0) & (inputs["length"][1] > 0)


def pair_metrics(inputs: LossInputs) -> dict[str, Array]:
    """Per pair: `reward_metrics` of beta times the log-ratios, or the log-probabilities for a reference-free loss."""
    quantity = "logratio" if "references" in inputs.needs else "logp"
    beta = inputs.options["beta"]
    return reward_metrics(beta * inputs[quantity][0], beta * inputs[quantity][1])


def reward_metrics(chosen: Array, rejected: Array) -> dict[str, Array]:
    """TRL's metrics: `rewards/chosen`, `rewards/rejected`, `rewards/margins` (their difference) and
    `rewards/accuracies` (whether it is positive)."""
    return {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": chosen > rejected,
    }


PAIRS = ExampleView(
    "pair", MappingProxyType(INPUTS), both_have_actions, metrics=pair_metrics, pair_description="pairs",
    shared_options=shared_pair_options(),
)  # fmt: skip
"""A scalar loss of a pair; averaged over the pairs in which both completions have at least one action.

Metrics: `pair_metrics`, and `nll/chosen` (per action) and `weight/pair` if their options are set.
"""

DIFFERENCES = PAIRS._replace(shared_options=shared_pair_options(reads_difference=True))
"""`PAIRS` for losses of the difference of the log-ratios alone, which also support other f-divergences."""

SUPERVISED = PAIRS._replace(shared_options=shared_pair_options(supervised=True))
"""`PAIRS` for losses that include the likelihood of the chosen completion."""
