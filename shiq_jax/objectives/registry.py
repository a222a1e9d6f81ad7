"""Objectives by name: each a short function from an Example to a LossOut around one plain loss."""

from collections.abc import Mapping
from types import MappingProxyType

import jax
import jax.numpy as jnp
from jaxtyping import ArrayLike

from shiq_jax.objectives.inputs import as_mask, check_choice, logratios, masked
from shiq_jax.objectives.preference import dpo_loss
from shiq_jax.objectives.residuals import bellman_residuals, squared_residuals, state_values
from shiq_jax.objectives.supervised import sft_loss
from shiq_jax.objectives.types import Example, LossOut, Objective, TokenStats


def shiq(
    example: Example,
    *,
    beta: ArrayLike = 0.1,
    gamma: ArrayLike = 1.0,
    horizon: str = "multi",
    n: int | None = None,
    value: str = "lse_shift",
    gradient: str = "full",
    normalisation: str = "sum_t",
    position_weight: str = "none",
) -> LossOut:
    """ShiQ on each sequence of an example; the defaults are `shiq_loss`, the other options its ablations.

    Weight: the sequences with at least one action. Metrics per sequence: `residual_abs`, the mean over actions of
    |residual|; `value`, the value of the first state; `logratio` and `return`, the sums over actions of the log-ratio
    (nats) and of the reward; `lse_abs`, the mean of |lse|, which is 0 when normalised logits were passed for raw ones.
    """
    check_choice("value", value, ("lse_shift", "lse"))
    policy, action_mask, rewards = _fields(example, "shiq", "policy", "action_mask", "rewards")

    def one_sequence(policy, reference, rewards, action_mask, bootstrap):
        residuals = bellman_residuals(
            policy, reference, rewards, action_mask, beta=beta, gamma=gamma, horizon=horizon, n=n, value=value,
            bootstrap=bootstrap, gradient=gradient,
        )
        loss = squared_residuals(residuals, action_mask, normalisation=normalisation, position_weight=position_weight)
        mask = as_mask(action_mask)
        actions = jnp.maximum(jnp.sum(mask), 1)
        values = state_values(policy, reference, mask, beta=beta, value=value)
        metrics = {
            "residual_abs": jnp.sum(jnp.abs(residuals)) / actions,
            "value": jnp.sum(jnp.where(jnp.cumsum(mask) == 1, values, 0)),
            "logratio": jnp.sum(logratios(policy, reference, mask)),
            "return": jnp.sum(masked(rewards, mask)),
            "lse_abs": jnp.sum(jnp.abs(masked(policy.lse, mask))) / actions,
        }
        return LossOut(loss, jnp.any(mask).astype(loss.dtype), metrics)

    reference = _reference(example, "shiq")
    outs = jax.vmap(one_sequence)(policy, reference, rewards, action_mask, example.bootstrap)
    return jax.tree.map(jnp.sum, outs)


def dpo(example: Example, *, beta: ArrayLike = 0.1, label_smoothing: ArrayLike = 0.0) -> LossOut:
    """DPO on a pair, sequence 0 chosen and sequence 1 rejected.

    Weight: 1, or 0 when either completion is empty. Metrics per pair: `rewards/chosen` and `rewards/rejected`, beta
    times the log-ratios; `rewards/margins`, their difference; `rewards/accuracies`, how often it is positive.
    """
    policy, action_mask = _fields(example, "dpo", "policy", "action_mask")
    if action_mask.shape[0] != 2:
        raise ValueError(f"action_mask has shape {action_mask.shape} but dpo takes pairs [2, T]; give two sequences.")
    mask = as_mask(action_mask)
    chosen, rejected = jnp.sum(logratios(policy, _reference(example, "dpo"), mask), axis=-1)
    loss = dpo_loss(chosen, rejected, beta=beta, label_smoothing=label_smoothing)
    weight = jnp.all(jnp.any(mask, axis=-1)).astype(loss.dtype)
    metrics = {
        "rewards/chosen": beta * chosen * weight,
        "rewards/rejected": beta * rejected * weight,
        "rewards/margins": beta * (chosen - rejected) * weight,
        "rewards/accuracies": (chosen > rejected) * weight,
    }
    return LossOut(loss * weight, weight, metrics)


def sft(example: Example) -> LossOut:
    """Maximum likelihood of the actions, averaged over tokens.

    Weight: the actions. Metric per token: `probability`, what the policy gives to the token.
    """
    policy, action_mask = _fields(example, "sft", "policy", "action_mask")
    mask = as_mask(action_mask)
    value = jnp.sum(jax.vmap(sft_loss)(policy, mask))
    probability = jnp.sum(jnp.where(mask, jnp.exp(masked(policy.logp, mask)), 0))
    return LossOut(value, jnp.sum(mask).astype(value.dtype), {"probability": probability})


def _fields(example: Example, objective: str, *names: str) -> list:
    for name in names:
        if getattr(example, name) is None:
            raise ValueError(f"Example.{name} is None but objective {objective!r} needs it; give it.")
    return [getattr(example, name) for name in names]


def _reference(example: Example, objective: str) -> TokenStats:
    (references,) = _fields(example, objective, "references")
    if "reference" not in references:
        raise ValueError(
            f"objective {objective!r} needs statistics of the model named 'reference', but Example.references has "
            f"{', '.join(map(repr, references)) or 'none'}; annotate the data with it."
        )
    return references["reference"]


OBJECTIVES: Mapping[str, Objective] = MappingProxyType(
    {
        "shiq": Objective(shiq, frozenset({"references", "rewards"}), "trajectory"),
        "dpo": Objective(dpo, frozenset({"references"}), "pair"),
        "sft": Objective(sft, frozenset(), "trajectory"),
    }
)
"""Every objective of the library by name; bind options with `OBJECTIVES[name].configure(beta=0.05)`."""
