"""Views of losses on single sequences, and what is reported beside them."""

from types import MappingProxyType

import jax.numpy as jnp
from jaxtyping import Array

from shiq_jax.objectives.lift import ExampleView
from shiq_jax.objectives.loss_inputs import LossInput, LossInputs
from shiq_jax.objectives.types import Sequence
from shiq_jax.objectives.validation import logratios, masked

VALUE, DOUBLE_Q = {"value": "value"}, {"q1": "q", "q2": "q"}


def _policy(reading: LossInputs):
    return reading.field("policy")


def _logratio(reading: LossInputs) -> Array:
    return jnp.sum(logratios(_policy(reading), reading.reference(), reading.mask), axis=-1)


def _desirable(reading: LossInputs) -> Array:
    return reading.field("labels") != 0


def _sequence(reading: LossInputs) -> Sequence:
    example = reading.example
    return Sequence(example.policy, reading.reference(), example.rewards, example.action_mask, example.bootstrap)


LOGRATIO = LossInput(_logratio, ("policy", "references"))
"""Log-ratio to the reference, summed over the actions of each sequence."""

DESIRABLE = LossInput(_desirable, ("labels",))
"""Whether each sequence is desirable."""

INPUTS = MappingProxyType(
    {
        "sequence": LossInput(_sequence, ("policy", "references", "rewards")),
        "policy": LossInput(_policy, ("policy",)),
        "reference": LossInput(LossInputs.reference, ("references",)),
        "rewards": LossInput(lambda reading: reading.field("rewards"), ("rewards",)),
        "action_mask": LossInput(lambda reading: reading.example.action_mask),
        "bootstrap": LossInput(lambda reading: reading.example.bootstrap),
        "logratio": LOGRATIO,
        "desirable": DESIRABLE,
        "v": LossInput(lambda reading: reading.head("value"), ("values",), VALUE),
        "q1": LossInput(lambda reading: reading.head("q1"), ("values",), {"q1": "q"}),
        "q": LossInput(lambda reading: (reading.head("q1"), reading.head("q2")), ("values",), DOUBLE_Q),
        "target_q": LossInput(
            lambda reading: (reading.head("target_q1"), reading.head("target_q2")), ("values",), target_heads=tuple(DOUBLE_Q)
        ),
    }
)


def _real(reading: LossInputs) -> Array:
    return jnp.any(reading.mask, axis=-1)


SEQUENCES = ExampleView("trajectory", INPUTS, _real, guard=False, each=True)
"""A loss of one sequence [T] that is 0 without actions; the mean over a batch runs over sequences with any."""

ACTIONS = SEQUENCES._replace(per_action=True)
"""A loss that is a sum over the actions of one sequence [T]; the mean over a batch runs over actions."""


def imitation_metrics(reading: LossInputs) -> dict[str, Array]:
    """Per action: `probability`, which the policy gives to the token."""
    logp = masked(reading["policy"].logp, reading.mask)
    return {"probability": jnp.sum(jnp.where(reading.mask, jnp.exp(logp), 0), axis=-1)}


def value_metrics(reading: LossInputs) -> dict[str, Array]:
    """Per sequence: `value`, the head's of the first state; `logratio` and `return`, sums over actions.

    `logratio` is the log-probability for a loss without reference.
    """
    reference = reading["reference"] if "references" in reading.needs else None
    mask = reading.mask
    first = jnp.cumsum(mask, axis=-1) == 1
    return {
        "value": jnp.sum(jnp.where(first, masked(reading["v"], mask), 0), axis=-1),
        "logratio": jnp.sum(logratios(reading["policy"], reference, mask), axis=-1),
        "return": jnp.sum(masked(reading["rewards"], mask), axis=-1),
    }


def q_metrics(reading: LossInputs) -> dict[str, Array]:
    """Per action: `q`, of the first head at the token that was taken, and `value` where there is such a head."""
    head, mask, values = reading["q1"], reading.mask, reading.field("values")
    metrics = {"q": jnp.sum(masked(head.logp, mask) + masked(head.lse, mask), axis=-1)}
    if "value" in values:
        metrics["value"] = jnp.sum(masked(values["value"], mask), axis=-1)
    return metrics


def label_metrics(reading: LossInputs) -> dict[str, Array]:
    """Per sequence: `rewards/signed`, beta times the log-ratio of a desirable answer, minus that of an undesirable one;
    `rewards/accuracies`, how often it is positive; `desirable`, the share of such answers.

    Means over the answers of one kind would couple the examples.
    """
    desirable = reading["desirable"]
    signed = jnp.where(desirable, 1, -1) * reading.options["beta"] * reading["logratio"]
    return {"rewards/signed": signed, "rewards/accuracies": signed > 0, "desirable": desirable}


LABELLED = SEQUENCES._replace(guard=True, metrics=label_metrics)
"""A loss of the log-ratio and the label of one sequence; the mean over a batch runs over sequences with actions."""
