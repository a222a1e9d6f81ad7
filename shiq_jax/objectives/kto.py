"""KTO and unpaired APO: losses on single completions with a binary label, and the coupling that estimates KTO's KL.

Shapes, types, errors and `s` as in `preference`; `desirable` is a boolean array of the shape of the log-ratio.
"""

from functools import partial
from types import MappingProxyType

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float

from shiq_jax.objectives.lift import ExampleView, read_inputs
from shiq_jax.objectives.loss_inputs import LossInput, LossInputs
from shiq_jax.objectives.sequences import DESIRABLE, LOGRATIO
from shiq_jax.objectives.types import Couple, Example
from shiq_jax.objectives.validation import as_float32, as_mask, check_nonnegative, check_positive, check_same_shape


def kto_loss(
    logratio: Float[Array, "..."],
    desirable: Bool[Array, "..."],
    *,
    kl: ArrayLike,
    beta: ArrayLike,
    desirable_weight: ArrayLike = 1.0,
    undesirable_weight: ArrayLike = 1.0,
) -> Float[Array, "..."]:
    """w (1 - s(beta (logratio - kl))) for a desirable, w (1 - s(beta (kl - logratio))) for an undesirable completion.

    Args:
      kl: reference point, at least 0 and without gradient: an estimate of KL(pi || pi_ref) in nats. The paper uses
        max(0, mean log-ratio of completions paired with other prompts).
      beta: temperature of the KL regularization.
      desirable_weight: weight w of desirable completions.
      undesirable_weight: weight w of undesirable completions; increase the weight of the rarer label.

    Source: KTO (arXiv 2402.01306).
    """
    check_nonnegative("desirable_weight", desirable_weight)
    check_nonnegative("undesirable_weight", undesirable_weight)
    check_same_shape(logratio=logratio, desirable=desirable)
    check_positive("beta", beta)
    is_desirable = as_mask(desirable)
    logit = beta * (as_float32(logratio) - jax.lax.stop_gradient(kl))
    logit = jnp.where(is_desirable, logit, -logit)
    return jnp.where(is_desirable, desirable_weight, undesirable_weight) * jax.nn.sigmoid(-logit)


def apo_zero_unpaired_loss(
    logratio: Float[Array, "..."],
    desirable: Bool[Array, "..."],
    *,
    beta: ArrayLike,
    desirable_weight: ArrayLike = 1.0,
    undesirable_weight: ArrayLike = 1.0,
) -> Float[Array, "..."]:
    """w (1 - s(beta logratio)) for a desirable, w s(beta logratio) for an undesirable completion; w as in `kto_loss`.

    Source: APO (arXiv 2408.06266) for single completions, as in TRL's KTO trainer.
    """
    weights = {"desirable_weight": desirable_weight, "undesirable_weight": undesirable_weight}
    return kto_loss(logratio, desirable, kl=0.0, beta=beta, **weights)


def _of_answer(quantity: str, inputs: LossInputs) -> Array:
    return inputs[quantity][0]


def kto_metrics(inputs: LossInputs) -> dict[str, Array]:
    """TRL's metrics: `rewards/chosen` and `rewards/rejected`, beta times the log-ratio, averaged over the desirable and
    the undesirable answers of the batch (0 if there are none); `rewards/margins`, their difference; `kl` in nats;
    `desirable`, the fraction of desirable answers."""
    coupled, beta = inputs["coupled"], inputs.options["beta"]
    desirable, logratio = inputs["desirable"], inputs["logratio"]
    # Dividing by the fraction of a label turns the mean over all answers into the mean over those with the label.
    chosen = desirable * beta * logratio / coupled["desirable"]
    rejected = ~desirable * beta * logratio / coupled["undesirable"]
    return {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "kl": coupled["kl"],
        "desirable": desirable,
    }


INPUTS = {
    "logratio": LossInput(partial(_of_answer, "logratios"), LOGRATIO.needs),
    "desirable": LossInput(partial(_of_answer, "labels"), DESIRABLE.needs),
    "kl": LossInput(lambda inputs: inputs["coupled"]["kl"]),
    "logratios": LOGRATIO,
    "labels": DESIRABLE,
    "has_actions": LossInput(lambda inputs: jnp.any(inputs.mask, axis=-1)),
    "coupled": LossInput(lambda inputs: inputs.field("coupled")),
}

ANSWERS = ExampleView(
    "group", MappingProxyType(INPUTS), partial(_of_answer, "has_actions"), metrics=kto_metrics,
    pair_description="an answer and a mismatched one",
)  # fmt: skip
"""A loss of sequence 0, averaged over the answers with at least one action.

Sequence 1, an answer to another prompt placed after this prompt, serves only the KL estimate.
"""


def _summary(example: Example) -> dict[str, Array]:
    inputs = read_inputs(example, ANSWERS, name="kto")
    has_actions = inputs["has_actions"]
    return {
        "mismatched_logratio": inputs["logratios"][1],
        "mismatched_valid": has_actions[1],
        "desirable": inputs["desirable"] & has_actions[0],
        "valid": has_actions[0],
    }


def _combine(summaries: dict[str, Array], weights: Float[Array, " B"]) -> dict[str, Array]:
    def mean(values, valid):
        valid = valid * weights
        return jnp.sum(jnp.where(valid > 0, values, 0)) / jnp.maximum(jnp.sum(valid), 1)

    fraction = mean(summaries["desirable"], summaries["valid"])
    coupled = {
        "kl": jnp.maximum(mean(summaries["mismatched_logratio"], summaries["mismatched_valid"]), 0),
        # The fraction of an absent label is replaced by 1 to avoid 0 / 0 in the metrics.
        "desirable": jnp.where(fraction > 0, fraction, 1),
        "undesirable": jnp.where(fraction < 1, 1 - fraction, 1),
    }
    return jax.tree.map(lambda value: jnp.broadcast_to(value, weights.shape), coupled)


KTO_COUPLE = Couple(_summary, _combine)
"""KL of the batch, max(0, mean log-ratio of the mismatched sequences), and the fractions of both labels."""
