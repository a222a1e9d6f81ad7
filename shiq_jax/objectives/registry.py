"""Registry of objectives: one line per plain loss."""

from collections.abc import Mapping
from types import MappingProxyType

from shiq_jax.objectives import (
    aot,
    kto,
    learned_values,
    policy_gradient,
    preference,
    q_learning,
    reference_free,
    regressions,
    sequences,
    shiq,
)
from shiq_jax.objectives.groups import GROUPS
from shiq_jax.objectives.lift import lift
from shiq_jax.objectives.pairs import DIFFERENCES, PAIRS, SUPERVISED
from shiq_jax.objectives.sequences import ACTIONS, LABELLED, SEQUENCES
from shiq_jax.objectives.supervised import sft_loss
from shiq_jax.objectives.types import Objective

LEARNED_VALUES = SEQUENCES._replace(metrics=sequences.value_metrics)
Q_VALUES = ACTIONS._replace(metrics=sequences.q_metrics)

OBJECTIVES: Mapping[str, Objective] = MappingProxyType(
    {
        "shiq": lift(shiq.shiq, SEQUENCES, has_aux=True),
        "reval": lift(shiq.reval, SEQUENCES, has_aux=True),
        "tbrm": lift(shiq.tbrm, SEQUENCES, has_aux=True),
        "vargrad": lift(regressions.vargrad_loss, GROUPS),
        "reinforce": lift(policy_gradient.reinforce_loss, GROUPS),
        "group_mean": lift(regressions.group_mean_loss, GROUPS),
        "a_star_po": lift(regressions.a_star_po_loss, GROUPS),
        "oreo": lift(learned_values.oreo_loss, LEARNED_VALUES, defaults={"beta": 0.03}),
        "pcl": lift(learned_values.pcl_loss, LEARNED_VALUES),
        "dro": lift(learned_values.dro_loss, LEARNED_VALUES),
        "ilql": lift(q_learning.ilql_loss, Q_VALUES),
        "cql": lift(q_learning.cql_loss, Q_VALUES),
        "mc_returns": lift(q_learning.mc_returns_loss, Q_VALUES, input_names={"q": "q1"}),
        "soft_q": lift(q_learning.soft_q_loss, Q_VALUES, input_names={"q": "q1"}),
        "sft": lift(sft_loss, ACTIONS, metrics=sequences.imitation_metrics),
        "dpo": lift(preference.dpo_loss, DIFFERENCES),
        "dpo_norm": lift(preference.dpo_norm_loss, PAIRS),
        "dpop": lift(preference.dpop_loss, PAIRS),
        "robust": lift(preference.robust_loss, DIFFERENCES),
        "hinge": lift(preference.hinge_loss, DIFFERENCES),
        "ipo": lift(preference.ipo_loss, PAIRS),
        "exo": lift(preference.exo_loss, DIFFERENCES),
        "nca": lift(preference.nca_loss, PAIRS),
        "bco": lift(preference.bco_loss, PAIRS),
        "sppo_hard": lift(preference.sppo_hard_loss, PAIRS),
        "apo_zero": lift(preference.apo_zero_loss, PAIRS),
        "apo_down": lift(preference.apo_down_loss, PAIRS),
        "discopop": lift(preference.discopop_loss, DIFFERENCES),
        "aot": lift(aot.aot_loss, PAIRS, couple=aot.AOT_COUPLE),
        "aot_unpaired": lift(aot.aot_unpaired_loss, PAIRS, couple=aot.AOT_UNPAIRED_COUPLE),
        "cpo": lift(reference_free.cpo_loss, SUPERVISED),
        "simpo": lift(reference_free.simpo_loss, PAIRS),
        "orpo": lift(reference_free.orpo_loss, SUPERVISED),
        "kto": lift(kto.kto_loss, kto.ANSWERS, couple=kto.KTO_COUPLE),
        "apo_zero_unpaired": lift(kto.apo_zero_unpaired_loss, LABELLED),
        "copg": lift(regressions.copg_loss, PAIRS),
        "rebel": lift(regressions.rebel_loss, PAIRS),
    }
)  # fmt: skip
"""All objectives by name; bind options with `OBJECTIVES[name].configure(beta=0.05)`."""
