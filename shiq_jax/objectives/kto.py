"""Losses on single completions with a label, good or bad, and what couples the examples of KTO.

Shapes, types, errors and `s` as in `preference`; `desirable` is a boolean of the log-ratio's shape.
"""

from functools import partial
from types import MappingProxyType

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float

from shiq_jax.objectives.lift import ExampleView, read_example
from shiq_jax.objectives.loss_inputs import LossInput, LossInputs
from shiq_jax.objectives.sequences import DESIRABLE, LOGRATIO
from shiq_jax.objectives.types import Couple, Example
from shiq_jax.objectives.validation import as_float32, as_mask, check_not_negative, check_positive, same_shape


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
      kl: the reference point, a constant of at least 0: an estimate of KL(pi || pi_ref), in nats. Published is
        max(0, mean log-ratio of completions that belong to other prompts), without gradient.
      beta: temperature of the KL regularisation.
      desirable_weight: weight w of desirable completions.
      undesirable_weight: weight w of undesirable completions; give more to the kind that is rarer.

    Source: KTO (arXiv 2402.01306).
    """
    check_not_negative("desirable_weight", desirable_weight)
    check_not_negative("undesirable_weight", undesirable_weight)
    signed, wanted = _signed(logratio, desirable, beta, jax.lax.stop_gradient(kl))
    return jnp.where(wanted, desirable_weight, undesirable_weight) * jax.nn.sigmoid(-signed)


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


def _first(kind: str, reading: LossInputs) -> Array:
    return reading[kind][0]


def kto_metrics(reading: LossInputs) -> dict[str, Array]:
    """Per answer, in TRL's names: `rewards/chosen` and `rewards/rejected`, beta times the log-ratio, of the batch's
    desirable and undesirable answers, 0 in a batch without any; `rewards/margins`, their difference; `kl`, in nats;
    `desirable`, the share of such answers."""
    coupled, beta = reading["coupled"], reading.options["beta"]
    desirable, logratio = reading["desirable"], reading["logratio"]
    # Divided by a share of the batch, a mean over all examples is a mean over those of one kind.
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
    "logratio": LossInput(partial(_first, "logratios"), LOGRATIO.needs),
    "desirable": LossInput(partial(_first, "labels"), DESIRABLE.needs),
    "kl": LossInput(lambda reading: reading["coupled"]["kl"]),
    "logratios": LOGRATIO,
    "labels": DESIRABLE,
    "real": LossInput(lambda reading: jnp.any(reading.mask, axis=-1)),
    "coupled": LossInput(lambda reading: reading.field("coupled")),
}

ANSWERS = ExampleView(
    "group", MappingProxyType(INPUTS), partial(_first, "real"), metrics=kto_metrics,
    two_sequences="an answer and a mismatched one",
)  # fmt: skip
"""A loss of sequence 0; sequence 1, another prompt's answer after this prompt, serves the KL alone.

The mean over a batch runs over answers with at least one action.
"""


def _summary(example: Example) -> dict[str, Array]:
    reading = read_example(example, ANSWERS, name="kto")
    real = reading["real"]
    return {
        "mismatched": reading["logratios"][1],
        "counts": real[1],
        "desirable": reading["desirable"] & real[0],
        "real": real[0],
    }


def _combine(summaries: dict[str, Array], weights: Float[Array, " B"]) -> dict[str, Array]:
    def mean(values, counted):
        counted = counted * weights
        return jnp.sum(jnp.where(counted > 0, values, 0)) / jnp.maximum(jnp.sum(counted), 1)

    share = mean(summaries["desirable"], summaries["real"])
    found = {
        "kl": jnp.maximum(mean(summaries["mismatched"], summaries["counts"]), 0),
        # Of a kind that does not occur nothing is divided by its share.
        "desirable": jnp.where(share > 0, share, 1),
        "undesirable": jnp.where(share < 1, 1 - share, 1),
    }
    return jax.tree.map(lambda value: jnp.broadcast_to(value, weights.shape), found)


MISMATCHED = Couple(_summary, _combine)
"""Brings each answer the batch's KL, max(0, mean log-ratio of the mismatched sequences), and the shares of labels."""


def _signed(logratio, desirable, beta, shift) -> tuple[Array, Array]:
    same_shape(logratio=logratio, desirable=desirable)
    check_positive("beta", beta)
    wanted = as_mask(desirable)
    value = beta * (as_float32(logratio) - shift)
    return jnp.where(wanted, value, -value), wanted
