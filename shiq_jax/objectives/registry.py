"""Objectives by name: each a short function from an Example to a LossOut around one plain loss."""

from collections.abc import Mapping
from types import MappingProxyType

import jax
import jax.numpy as jnp
from jaxtyping import ArrayLike

from shiq_jax.objectives import (
    learned_values,
    policy_gradient,
    preference,
    reference_free,
    regressions,
    transport,
    unpaired,
)
from shiq_jax.objectives.groups import groupwise
from shiq_jax.objectives.inputs import as_mask, check_choice, logratios, masked
from shiq_jax.objectives.pairs import fields, pairwise, reference_of
from shiq_jax.objectives.residuals import bellman_residuals, squared_residuals, state_values
from shiq_jax.objectives.supervised import sft_loss
from shiq_jax.objectives.types import Example, LossOut, Objective


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
    policy, action_mask, rewards = fields(example, "shiq", "policy", "action_mask", "rewards")

    def one_sequence(policy, reference, rewards, action_mask, bootstrap):
        residuals = bellman_residuals(
            policy,
            reference,
            rewards,
            action_mask,
            beta=beta,
            gamma=gamma,
            horizon=horizon,
            n=n,
            value=value,
            bootstrap=bootstrap,
            gradient=gradient,
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

    reference = reference_of(example, "shiq")
    outs = jax.vmap(one_sequence)(policy, reference, rewards, action_mask, example.bootstrap)
    return jax.tree.map(jnp.sum, outs)


def reval(example: Example, *, beta: ArrayLike = 0.1) -> LossOut:
    """ReVal on each sequence: (lse - lse_ref at the first action + lr - R / beta)^2.

    That is the square of ShiQ's first residual over beta^2. Weight and metrics as `shiq`. Source: arXiv 2603.23355.
    """
    out = shiq(example, beta=beta, horizon="trajectory")
    return out._replace(value=out.value / beta**2)


def tbrm(example: Example, *, beta: ArrayLike = 0.1) -> LossOut:
    """TBRM on each sequence: `reval` without the shift, (lse at the first action + lr - R / beta)^2.

    Weight and metrics as `shiq`. Source: arXiv 2505.15311.
    """
    out = shiq(example, beta=beta, horizon="trajectory", value="lse")
    return out._replace(value=out.value / beta**2)


def sft(example: Example) -> LossOut:
    """Maximum likelihood of the actions, averaged over tokens.

    Weight: the actions. Metric per token: `probability`, what the policy gives to the token.
    """
    policy, action_mask = fields(example, "sft", "policy", "action_mask")
    mask = as_mask(action_mask)
    value = jnp.sum(jax.vmap(sft_loss)(policy, mask))
    probability = jnp.sum(jnp.where(mask, jnp.exp(masked(policy.logp, mask)), 0))
    return LossOut(value, jnp.sum(mask).astype(value.dtype), {"probability": probability})


VALUE = MappingProxyType({"value": "value"})
DOUBLE_Q = MappingProxyType({"q1": "q", "q2": "q"})

OBJECTIVES: Mapping[str, Objective] = MappingProxyType(
    {
        "shiq": Objective(shiq, frozenset({"references", "rewards"}), "trajectory"),
        "reval": Objective(reval, frozenset({"references", "rewards"}), "trajectory"),
        "tbrm": Objective(tbrm, frozenset({"references", "rewards"}), "trajectory"),
        "vargrad": groupwise(regressions.vargrad_loss),
        "reinforce": groupwise(policy_gradient.reinforce_loss),
        "group_mean": groupwise(regressions.group_mean_loss),
        "a_star_po": groupwise(regressions.a_star_po_loss),
        "oreo": Objective(learned_values.oreo, frozenset({"references", "rewards"}), "trajectory", heads=VALUE),
        "pcl": Objective(learned_values.pcl, frozenset({"rewards"}), "trajectory", heads=VALUE),
        "dro": Objective(learned_values.dro, frozenset({"references", "rewards"}), "trajectory", heads=VALUE),
        "ilql": Objective(
            learned_values.ilql, frozenset({"rewards"}), "trajectory", heads=VALUE | DOUBLE_Q, slow=("q1", "q2"),
            policy=False,
        ),
        "cql": Objective(
            learned_values.cql, frozenset({"rewards"}), "trajectory", heads=DOUBLE_Q, slow=("q1", "q2"), policy=False,
        ),
        "mc_returns": Objective(
            learned_values.mc_returns, frozenset({"rewards"}), "trajectory", heads=MappingProxyType({"q1": "q"}),
            policy=False,
        ),
        "sft": Objective(sft, frozenset(), "trajectory"),
        "dpo": pairwise(preference.dpo_loss, differential=True),
        "dpo_norm": pairwise(preference.dpo_norm_loss),
        "dpop": pairwise(preference.dpop_loss),
        "robust": pairwise(preference.robust_loss, differential=True),
        "hinge": pairwise(preference.hinge_loss, differential=True),
        "ipo": pairwise(preference.ipo_loss),
        "exo": pairwise(preference.exo_loss, differential=True),
        "nca": pairwise(preference.nca_loss),
        "bco": pairwise(preference.bco_loss),
        "sppo_hard": pairwise(preference.sppo_hard_loss),
        "apo_zero": pairwise(preference.apo_zero_loss),
        "apo_down": pairwise(preference.apo_down_loss),
        "discopop": pairwise(preference.discopop_loss, differential=True),
        "aot": pairwise(transport.aot_loss, transport.AOT),
        "aot_unpaired": pairwise(transport.aot_unpaired_loss, transport.AOT_UNPAIRED),
        "cpo": pairwise(reference_free.cpo_loss, supervised=True),
        "simpo": pairwise(reference_free.simpo_loss),
        "orpo": pairwise(reference_free.orpo_loss, supervised=True),
        "kto": Objective(unpaired.kto, frozenset({"references", "labels"}), "group", unpaired.MISMATCHED),
        "apo_zero_unpaired": Objective(
            unpaired.apo_zero_unpaired, frozenset({"references", "labels"}), "trajectory"
        ),
        "copg": pairwise(regressions.copg_loss),
        "rebel": pairwise(regressions.rebel_loss),
    }
)  # fmt: skip
"""Every objective of the library by name; bind options with `OBJECTIVES[name].configure(beta=0.05)`."""
