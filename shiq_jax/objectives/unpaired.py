"""Losses on single completions with a label, good or bad: of their log-ratios, and as objectives on examples.

Shapes, types, errors and `s` as in `preference`; `desirable` is a boolean of the log-ratio's shape.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float

from shiq_jax.objectives.inputs import as_mask, check_positive, logratios, same_shape, widened
from shiq_jax.objectives.pairs import BETA, fields, reference_of
from shiq_jax.objectives.types import Couple, Example, LossOut


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
      desirable_weight, undesirable_weight: w of either kind.

    Source: KTO (arXiv 2402.01306).
    """
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


def kto(
    example: Example,
    *,
    beta: ArrayLike = BETA,
    desirable_weight: ArrayLike = 1.0,
    undesirable_weight: ArrayLike = 1.0,
) -> LossOut:
    """`kto_loss` of sequence 0; sequence 1, another prompt's answer after this prompt, serves the KL alone.

    Weight: 1, or 0 when the answer has no action. Metrics, in TRL's names: `rewards/chosen` and `rewards/rejected`,
    beta times the log-ratio, of the whole batch's desirable and undesirable answers, 0 in a batch without any;
    `rewards/margins`, their difference; `kl`, in nats; `desirable`, the share of such answers.
    """
    relative, real, desirable = _read(example, "kto", 2)
    (coupled,) = fields(example, "kto", "coupled")
    weights = {"desirable_weight": desirable_weight, "undesirable_weight": undesirable_weight}
    value = kto_loss(relative[0], desirable[0], kl=coupled["kl"], beta=beta, **weights)
    # Divided by a share of the batch, a mean over all examples is a mean over those of one kind.
    chosen = desirable[0] * beta * relative[0] / coupled["desirable"]
    rejected = ~desirable[0] * beta * relative[0] / coupled["undesirable"]
    metrics = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "kl": coupled["kl"],
        "desirable": desirable[0],
    }
    return _counted(value, real[0], metrics)


def apo_zero_unpaired(
    example: Example,
    *,
    beta: ArrayLike = BETA,
    desirable_weight: ArrayLike = 1.0,
    undesirable_weight: ArrayLike = 1.0,
) -> LossOut:
    """`apo_zero_unpaired_loss` of each sequence of an example.

    Weight: the sequences with at least one action. Metrics per sequence: `rewards/signed`, beta times the log-ratio of
    a desirable answer, minus that of an undesirable one; `rewards/accuracies`, how often it is positive; `desirable`,
    the share of such answers. (Means over the answers of one kind would couple the examples.)
    """
    relative, real, desirable = _read(example, "apo_zero_unpaired")
    weights = {"desirable_weight": desirable_weight, "undesirable_weight": undesirable_weight}
    value = apo_zero_unpaired_loss(relative, desirable, beta=beta, **weights)
    signed = jnp.where(desirable, 1, -1) * beta * relative
    metrics = {"rewards/signed": signed, "rewards/accuracies": signed > 0, "desirable": desirable}
    return jax.tree.map(jnp.sum, _counted(value, real, metrics))


def _summary(example: Example) -> dict[str, Array]:
    relative, real, desirable = _read(example, "kto", 2)
    return {"mismatched": relative[1], "counts": real[1], "desirable": desirable[0] & real[0], "real": real[0]}


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


def _read(example: Example, name: str, sequences: int | None = None) -> tuple[Array, Array, Array]:
    """Of each sequence: its log-ratio, summed over its actions, whether it has any, and whether it is desirable."""
    policy, action_mask, labels = fields(example, name, "policy", "action_mask", "labels")
    if sequences not in (None, action_mask.shape[0]):
        raise ValueError(
            f"action_mask has shape {action_mask.shape} but {name} takes an answer and a mismatched one [2, T]; give "
            "two sequences."
        )
    mask = as_mask(action_mask)
    relative = jnp.sum(logratios(policy, reference_of(example, name), mask), axis=-1)
    return relative, jnp.any(mask, axis=-1), as_mask(labels)


def _counted(value: Array, real: Array, metrics: dict[str, Any]) -> LossOut:
    """What is real of a loss and its metrics."""
    weight = real.astype(value.dtype)
    return LossOut(jnp.where(real, value, 0), weight, {name: each * weight for name, each in metrics.items()})


def _signed(logratio, desirable, beta, shift) -> tuple[Array, Array]:
    same_shape(logratio=logratio, desirable=desirable)
    check_positive("beta", beta)
    wanted = as_mask(desirable)
    value = beta * (widened(logratio) - shift)
    return jnp.where(wanted, value, -value), wanted
