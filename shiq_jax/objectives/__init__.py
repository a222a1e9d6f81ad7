"""Losses of post-training as pure functions of token statistics; needs only jax, numpy and jaxtyping."""

from shiq_jax.objectives.groups import GROUPS
from shiq_jax.objectives.kto import ANSWERS, apo_zero_unpaired_loss, kto_loss
from shiq_jax.objectives.learned_values import dro_loss, oreo_loss, pcl_loss
from shiq_jax.objectives.lift import ExampleView, lift
from shiq_jax.objectives.option_checks import check_options
from shiq_jax.objectives.options import Option
from shiq_jax.objectives.pairs import DIFFERENCES, PAIRS, SUPERVISED
from shiq_jax.objectives.policy_gradient import reinforce_loss
from shiq_jax.objectives.preference import (
    apo_down_loss,
    apo_zero_loss,
    bco_loss,
    discopop_loss,
    divergence_score,
    dpo_loss,
    dpo_norm_loss,
    dpop_loss,
    exo_loss,
    hinge_loss,
    ipo_loss,
    nca_loss,
    robust_loss,
    sppo_hard_loss,
)
from shiq_jax.objectives.q_learning import cql_loss, ilql_loss, mc_returns_loss, soft_q_loss
from shiq_jax.objectives.reference_free import cpo_loss, orpo_loss, simpo_loss
from shiq_jax.objectives.registry import OBJECTIVES
from shiq_jax.objectives.regressions import a_star_po_loss, copg_loss, group_mean_loss, rebel_loss, vargrad_loss
from shiq_jax.objectives.residuals import bellman_residuals, shiq_loss, squared_residuals
from shiq_jax.objectives.sequences import ACTIONS, LABELLED, SEQUENCES
from shiq_jax.objectives.supervised import sft_loss
from shiq_jax.objectives.token_statistics import token_stats, token_stats_from_logits
from shiq_jax.objectives.types import Couple, Example, LossOut, Objective, Sequence, TokenStats
from shiq_jax.objectives.weighting import length_desensitised, wpo_weight

__all__ = [
    "ACTIONS",
    "ANSWERS",
    "DIFFERENCES",
    "GROUPS",
    "LABELLED",
    "OBJECTIVES",
    "PAIRS",
    "SEQUENCES",
    "SUPERVISED",
    "Couple",
    "Example",
    "ExampleView",
    "LossOut",
    "Objective",
    "Option",
    "Sequence",
    "TokenStats",
    "a_star_po_loss",
    "apo_down_loss",
    "apo_zero_loss",
    "apo_zero_unpaired_loss",
    "bco_loss",
    "bellman_residuals",
    "check_options",
    "copg_loss",
    "cpo_loss",
    "cql_loss",
    "discopop_loss",
    "divergence_score",
    "dpo_loss",
    "dpo_norm_loss",
    "dpop_loss",
    "dro_loss",
    "exo_loss",
    "group_mean_loss",
    "hinge_loss",
    "ilql_loss",
    "ipo_loss",
    "kto_loss",
    "length_desensitised",
    "lift",
    "mc_returns_loss",
    "nca_loss",
    "oreo_loss",
    "orpo_loss",
    "pcl_loss",
    "rebel_loss",
    "reinforce_loss",
    "robust_loss",
    "sft_loss",
    "shiq_loss",
    "simpo_loss",
    "soft_q_loss",
    "sppo_hard_loss",
    "squared_residuals",
    "token_stats",
    "token_stats_from_logits",
    "vargrad_loss",
    "wpo_weight",
]

# Former name of `ExampleView`.
View = ExampleView
