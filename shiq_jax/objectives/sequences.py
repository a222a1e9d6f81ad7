"""Views of losses on single sequences and their metrics."""

from types import MappingProxyType

import jax.numpy as jnp
from jaxtyping import Array

from shiq_jax.objectives.lift import ExampleView
from shiq_jax.objectives.loss_inputs import LossInput, LossInputs
from shiq_jax.objectives.types import Sequence, TokenStats
from shiq_jax.objectives.validation import logratios, masked

VALUE, SINGLE_Q, DOUBLE_Q = {"value": "value"}, {"q1": "q"}, {"q1": "q", "q2": "q"}


def _policy(inputs: LossInputs) -> TokenStats:
    return inputs.field("policy")


def _logratio(inputs: LossInputs) -> Array:
    return jnp.sum(logratios(_policy(inputs), inputs.reference(), inputs.mask), axis=-1)


def _desirable(inputs: LossInputs) -> Array:
    return inputs.field("labels") != 0


def _sequence(inputs: LossInputs) -> Sequence:
    example = inputs.example
    return Sequence(example.policy, inputs.reference(), example.rewards, example.action_mask, example.bootstrap)


def _target_q(inputs: LossInputs) -> tuple[TokenStats, TokenStats]:
    return inputs.head("target_q1"), inputs.head("target_q2")


LOGRATIO = LossInput(_logratio, ("policy", "references"))
"""Log-ratio to the reference, summed over the actions of each sequence."""

DESIRABLE = LossInput(_desirable, ("labels",))
"""Whether each sequence is desirable."""

INPUTS = MappingProxyType(
    {
        "sequence": LossInput(_sequence, ("policy", "references", "rewards")),
        "policy": LossInput(_policy, ("policy",)),
        "reference": LossInput(LossInputs.reference, ("references",)),
        "rewards": LossInput(lambda inputs: inputs.field("rewards"), ("rewards",)),
        "action_mask": LossInput(lambda inputs: inputs.example.action_mask),
        "bootstrap": LossInput(lambda inputs: inputs.example.bootstrap),
        "logratio": LOGRATIO,
        "desirable": DESIRABLE,
        "v": LossInput(lambda inputs: inputs.head("value"), ("values",), VALUE),
        "q1": LossInput(lambda inputs: inputs.head("q1"), ("values",), SINGLE_Q),
        "q": LossInput(lambda inputs: (inputs.head("q1"), inputs.head("q2")), ("values",), DOUBLE_Q),
        "target_q": LossInput(_target_q, ("values",), target_heads=tuple(DOUBLE_Q)),
        "target_lse": LossInput(lambda inputs: inputs.head("target_q1").lse, ("values",), target_heads=tuple(SINGLE_Q)),
    }
)


def _has_actions(inputs: LossInputs) -> Array:
    return jnp.any(inputs.mask, axis=-1)


SEQUENCES = ExampleView("trajectory", INPUTS, _has_actions, mask_invalid=False, per_sequence=True)
"""A loss of one sequence [T] that is 0 without actions; averaged over the sequences with at least one action."""

ACTIONS = SEQUENCES._replace(token_mean=True)
"""A sum over the actions of one sequence [T]; averaged over actions."""


def imitation_metrics(inputs: LossInputs) -> dict[str, Array]:
    """Per action: `probability` of the token under the policy."""
    logp = masked(inputs["policy"].logp, inputs.mask)
    return {"probability": jnp.sum(jnp.where(inputs.mask, jnp.exp(logp), 0), axis=-1)}


def value_metrics(inputs: LossInputs) -> dict[str, Array]:
    """Per sequence: `value` of the first state from the value head; `logratio` and `return`, summed over actions.

    Without a reference, `logratio` is the log-probability.
    """
    reference = inputs["reference"] if "references" in inputs.needs else None
    mask = inputs.mask
    first = jnp.cumsum(mask, axis=-1) == 1
    return {
        "value": jnp.sum(jnp.where(first, masked(inputs["v"], mask), 0), axis=-1),
        "logratio": jnp.sum(logratios(inputs["policy"], reference, mask), axis=-1),
        "return": jnp.sum(masked(inputs["rewards"], mask), axis=-1),
    }


def q_metrics(inputs: LossInputs) -> dict[str, Array]:
    """Per action: `q` of the token taken, from the first Q head, and `value` from the value head if there is one."""
    head, mask, values = inputs["q1"], inputs.mask, inputs.field("values")
    metrics = {"q": jnp.sum(masked(head.logp, mask) + masked(head.lse, mask), axis=-1)}
    if "value" in values:
        metrics["value"] = jnp.sum(masked(values["value"], mask), axis=-1)
    return metrics


def label_metrics(inputs: LossInputs) -> dict[str, Array]:
    """Per sequence: `rewards/signed`, beta times the log-ratio, negated for undesirable answers;
    `rewards/accuracies`, the fraction where it is positive; `desirable`, the fraction of desirable answers.

    Means over the answers of one label would couple the examples.
    """
    desirable = inputs["desirable"]
    signed = jnp.where(desirable, 1, -1) * inputs.options["beta"] * inputs["logratio"]
    return {"rewards/signed": signed, "rewards/accuracies": signed > 0, "desirable": desirable}


LABELLED = SEQUENCES._replace(mask_invalid=True, metrics=label_metrics)
"""A loss of the log-ratio and the label of one sequence; averaged over the sequences with at least one action."""
