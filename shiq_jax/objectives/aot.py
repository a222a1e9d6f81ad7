"""AOT, alignment via optimal transport (arXiv 2406.05882): compare pairs as distributions over the batch, by sorting.

In one dimension the optimal transport plan matches the k-th smallest values of two samples. Each example therefore
needs only its match from the batch, which `Couple` provides without gradient.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from shiq_jax.objectives.lift import read_inputs
from shiq_jax.objectives.pairs import PAIRS, both_have_actions
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
    """`dpo_loss` of the policy's margin against the reference's margin of the same rank in the batch.

    coupled: that margin of the reference, chosen minus rejected log-probability; see `AOT_COUPLE`.
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

    Each rank's loss is counted twice, by the example of its chosen and by that of its rejected log-ratio, and halved in
    value. The gradient is not halved, because matches carry no gradient.

    coupled: the rejected log-ratio matched to the chosen one, and the chosen log-ratio matched to the rejected one.
    """
    options = {"beta": beta, "label_smoothing": label_smoothing}
    matched_rejected, matched_chosen = coupled
    chosen_loss = dpo_loss(chosen_logratio, matched_rejected, **options)
    rejected_loss = dpo_loss(matched_chosen, rejected_logratio, **options)
    total = chosen_loss + rejected_loss
    return total - jax.lax.stop_gradient(total) / 2


def _margins(example: Example) -> tuple[Array, Array, Array]:
    inputs = read_inputs(example, PAIRS, name="aot")
    policy_margin = inputs["logp"][0] - inputs["logp"][1]
    reference_margin = policy_margin - (inputs["logratio"][0] - inputs["logratio"][1])
    return policy_margin, reference_margin, both_have_actions(inputs)


def _logratios(example: Example) -> tuple[Array, Array, Array]:
    inputs = read_inputs(example, PAIRS, name="aot_unpaired")
    return inputs["logratio"][0], inputs["logratio"][1], both_have_actions(inputs)


def match_by_rank(
    values: Float[Array, " B"], candidates: Float[Array, " B"], weights: Float[Array, " B"]
) -> Float[Array, " B"]:
    """For each value with positive weight, the candidate of the same rank among those with positive weight."""
    order = jnp.argsort(jnp.where(weights > 0, values, jnp.inf))
    rank = jnp.argsort(order)
    return jnp.sort(jnp.where(weights > 0, candidates, jnp.inf))[rank]


def _match_margins(summaries, weights: Float[Array, " B"]):
    policy_margins, reference_margins, valid = summaries
    return match_by_rank(policy_margins, reference_margins, weights * valid)


def _match_logratios(summaries, weights: Float[Array, " B"]):
    chosen, rejected, valid = summaries
    weights = weights * valid
    return match_by_rank(chosen, rejected, weights), match_by_rank(rejected, chosen, weights)


AOT_COUPLE = Couple(_margins, _match_margins)
"""The reference's margin of the same rank as the policy's margin."""

AOT_UNPAIRED_COUPLE = Couple(_logratios, _match_logratios)
"""The rejected log-ratio of the same rank as the chosen one, and vice versa."""
