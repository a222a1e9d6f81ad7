"""AOT: alignment by optimal transport. Pairs are compared not one by one but as distributions, by sorting (2406.05882).

In one dimension the optimal plan between two samples pairs the k-th smallest of one with the k-th smallest of the
other, so that a loss needs of the whole batch only each example's partner, which `Couple` brings without gradient.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from shiq_jax.objectives.lift import read_example
from shiq_jax.objectives.pairs import PAIRS, both_real
from shiq_jax.objectives.preference import dpo_loss
from shiq_jax.objectives.types import Couple, Example


def aot_loss(
    chosen_logp: Float[Array, ""],
    rejected_logp: Float[Array, ""],
    coupled: Float[Array, ""],
    *,
    beta: ArrayLike,
    label_smoothing: ArrayLike = 0.0,
) -> Float[Array, ""]:
    """`dpo_loss` of the policy's margin over the reference's margin of the same rank in the batch.

    coupled: that margin of the reference, chosen log-probability less rejected; see `AOT`.
    """
    return dpo_loss(chosen_logp - rejected_logp, coupled, beta=beta, label_smoothing=label_smoothing)


def aot_unpaired_loss(
    chosen_logratio: Float[Array, ""],
    rejected_logratio: Float[Array, ""],
    coupled: tuple[Float[Array, ""], Float[Array, ""]],
    *,
    beta: ArrayLike,
    label_smoothing: ArrayLike = 0.0,
) -> Float[Array, ""]:
    """`dpo_loss` of chosen against rejected log-ratios of the same rank in the batch.

    A rank's loss belongs half to the pair whose chosen completion has it and half to the one whose rejected completion
    has; either half carries its side's whole gradient, since partners carry none. coupled: the rejected log-ratio that
    is the chosen one's partner, and the chosen one that is the rejected one's.
    """
    options = {"beta": beta, "label_smoothing": label_smoothing}
    against_rejected, against_chosen = coupled
    both = dpo_loss(chosen_logratio, against_rejected, **options) + dpo_loss(
        against_chosen, rejected_logratio, **options
    )
    return both - jax.lax.stop_gradient(both) / 2


def _margins(example: Example) -> tuple[Array, Array, Array]:
    reading = read_example(example, PAIRS, name="aot")
    margin = reading["logp"][0] - reading["logp"][1]
    return margin, margin - (reading["logratio"][0] - reading["logratio"][1]), both_real(reading)


def _logratios(example: Example) -> tuple[Array, Array, Array]:
    reading = read_example(example, PAIRS, name="aot_unpaired")
    return reading["logratio"][0], reading["logratio"][1], both_real(reading)


def partners(values: Float[Array, " B"], others: Float[Array, " B"], counted: Float[Array, " B"]) -> Float[Array, " B"]:
    """For each value that counts, the one of `others` that has its rank among those that count."""
    order = jnp.argsort(jnp.where(counted > 0, values, jnp.inf))
    rank = jnp.argsort(order)
    return jnp.sort(jnp.where(counted > 0, others, jnp.inf))[rank]


def _combine(summaries, weights: Float[Array, " B"]):
    values, others, real = summaries
    return partners(values, others, weights * real)


def _combine_both(summaries, weights: Float[Array, " B"]):
    chosen, rejected, real = summaries
    counted = weights * real
    return partners(chosen, rejected, counted), partners(rejected, chosen, counted)


AOT = Couple(_margins, _combine)
"""Brings each pair the reference's margin that has the rank of the policy's."""

AOT_UNPAIRED = Couple(_logratios, _combine_both)
"""Brings each chosen log-ratio the rejected one of its rank, and the other way round."""
