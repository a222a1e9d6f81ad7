"""Views of losses on pairs: sequence 0 is the chosen, sequence 1 the rejected completion."""

from collections.abc import Callable
from functools import partial
from types import MappingProxyType

import jax.numpy as jnp
from jaxtyping import Array

from shiq_jax.objectives.lift import ExampleView
from shiq_jax.objectives.loss_inputs import LossInput, LossInputs
from shiq_jax.objectives.pair_options import chosen_options, score, shared, total_over_actions
from shiq_jax.objectives.validation import logratios, masked


def _logp(reading: LossInputs) -> Array:
    return total_over_actions(masked(reading.field("policy").logp, reading.mask), reading)


def _logratio(reading: LossInputs) -> Array:
    return total_over_actions(logratios(reading.field("policy"), reading.reference(), reading.mask), reading)


def _length(reading: LossInputs) -> Array:
    return jnp.sum(reading.mask, axis=-1)


def _return(reading: LossInputs) -> Array:
    return jnp.sum(masked(reading.field("rewards"), reading.mask), -1)


def _of(place: int, kind: str, reading: LossInputs) -> Array:
    return reading[kind][place]


def _scored(place: int, kind: str, reading: LossInputs) -> Array:
    return score(reading[kind][place], reading)


def _both(kind: str, *needs: str, side: Callable = _of) -> dict[str, LossInput]:
    sides = enumerate(("chosen", "rejected"))
    return {f"{which}_{kind}": LossInput(partial(side, place, kind), needs) for place, which in sides}


OF_A_LOSS = {
    **_both("logratio", "policy", "references", side=_scored),
    **_both("logp", "policy"),
    **_both("length"),
    **_both("return", "rewards"),
    # What couples pairs compares them with the reference.
    "coupled": LossInput(lambda reading: reading.field("coupled"), ("policy", "references")),
}
"""Sums over the actions of either completion, in nats or units of reward, or their number; `coupled`, see `Couple`."""

INPUTS = OF_A_LOSS | {
    "pair_options": LossInput(chosen_options),
    "logratio": LossInput(_logratio, ("policy", "references")),
    "logp": LossInput(_logp, ("policy",)),
    "length": LossInput(_length),
    "return": LossInput(_return, ("rewards",)),
}
"""Also both completions' sums as [2], and the shared options."""


def both_real(reading: LossInputs) -> Array:
    """Whether both completions have an action."""
    return (reading["length"][0] > 0) & (reading["length"][1] > 0)


def pair_metrics(reading: LossInputs) -> dict[str, Array]:
    """Per pair: the metrics of `reward_metrics` of beta times the log-ratios, or the log-probabilities where the loss
    reads no reference."""
    kind = "logratio" if "references" in reading.needs else "logp"
    beta = reading.options["beta"]
    return reward_metrics(beta * reading[kind][0], beta * reading[kind][1])


def reward_metrics(chosen: Array, rejected: Array) -> dict[str, Array]:
    """`rewards/chosen`, `rewards/rejected`; `rewards/margins`, their difference; `rewards/accuracies`, whether it is
    positive."""
    return {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": chosen > rejected,
    }


PAIRS = ExampleView(
    "pair", MappingProxyType(INPUTS), both_real, metrics=pair_metrics, two_sequences="pairs", shared=shared()
)
"""A loss of scalars; the mean over a batch runs over pairs of which both completions have an action.

Metrics: those of `pair_metrics`, and with the options that use them `nll/chosen`, per action, and `weight/pair`.
"""

DIFFERENCES = PAIRS._replace(shared=shared(differential=True))
"""`PAIRS` whose loss reads the log-ratios as their difference alone, so that it takes other divergences."""

SUPERVISED = PAIRS._replace(shared=shared(supervised=True))
"""`PAIRS` whose loss has the chosen completion's likelihood as a term."""
