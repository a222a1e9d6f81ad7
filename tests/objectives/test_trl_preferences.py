"""Losses and their gradients are TRL's, of whole batches and to every token's log-probability; see tests/goldens."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shiq_jax.objectives import OBJECTIVES, Example, TokenStats, reference_free, transport, unpaired

GOLDEN = json.loads((Path(__file__).parent.parent / "goldens" / "trl_preferences.json").read_text())
MASK = np.array(GOLDEN["mask"], bool)
POLICY, REFERENCE, COLLISION = (np.array(GOLDEN[name]) for name in ("policy", "reference", "collision"))
PAIRS, BETA = len(MASK) // 2, GOLDEN["beta"]
NAMES = {"sigmoid": "dpo", "sigmoid_norm": "dpo_norm", "exo_pair": "exo", "nca_pair": "nca", "bco_pair": "bco"}
OPTIONS = {"discopop_tau": "tau", "f_divergence_type": "f_divergence", "f_alpha_divergence_coef": "f_alpha"}


def halves(values):
    return values[:PAIRS], values[PAIRS:]


def logratios(policy):
    return jnp.sum(jnp.where(MASK, policy - REFERENCE, 0), axis=1)


def example_of(policy) -> Example:
    """All pairs, with a leading axis."""
    policy, reference, collision, mask = (
        jnp.stack(halves(jnp.asarray(values)), axis=1) for values in (policy, REFERENCE, COLLISION, MASK)
    )
    nothing = jnp.zeros_like(policy)
    stats, fixed = TokenStats(policy, nothing, collision), TokenStats(reference, nothing)
    return Example(policy=stats, references={"reference": fixed}, action_mask=mask)


def registered(name, policy, options):
    """The objective's mean over the pairs, coupled first where it is."""
    objective, example = OBJECTIVES[NAMES.get(name, name)].configure(beta=BETA, **options), example_of(policy)
    if objective.couple:
        summaries = jax.vmap(objective.couple.summary)(example)
        combined = objective.couple.combine(summaries, jnp.ones(PAIRS))
        example = example._replace(coupled=jax.lax.stop_gradient(combined))
    out = jax.vmap(objective.loss)(example)
    return out.value.sum() / out.weight.sum()


def kto(policy):
    desirable = np.arange(len(MASK)) < PAIRS
    weights = {"desirable_weight": 1.3, "undesirable_weight": 0.7}
    kl = max(0.0, np.mean(GOLDEN["kl"]))
    return unpaired.kto_loss(logratios(policy), desirable, kl=kl, beta=BETA, **weights).mean()


def apo_zero_unpaired(policy):
    # TRL weighs these, too.
    weights = np.where(np.arange(len(MASK)) < PAIRS, 1.3, 0.7)
    return (weights * unpaired.apo_zero_unpaired_loss(logratios(policy), weights > 1, beta=BETA)).mean()


def on_sums(loss, averaged=False):
    def run(policy):
        sums = halves(jnp.sum(jnp.where(MASK, policy, 0), axis=1))
        return loss(*sums, *(halves(MASK.sum(1)) if averaged else ())).mean()

    return run


def orpo_contrast(*arguments):
    averages = arguments[0] / arguments[2]
    return reference_free.orpo_loss(*arguments, beta=BETA) + averages


OTHERS = {
    "kto": kto,
    "apo_zero_unpaired": apo_zero_unpaired,
    "cpo": on_sums(lambda w, l: reference_free.cpo_loss(w, l, beta=BETA, alpha=0.0, label_smoothing=0.15)),
    "simpo": on_sums(lambda *x: reference_free.simpo_loss(*x, beta=BETA, margin=0.3), averaged=True),
    "orpo": on_sums(orpo_contrast, averaged=True),
}
# Computed in float32 over there; elsewhere some of its constants are.
ROUGH = {"sigmoid, alpha_divergence", "orpo"}


@pytest.mark.parametrize("name", GOLDEN["variants"])
def test_loss_and_gradient_are_those_of_trl(name, x64):
    variant = GOLDEN["variants"][name]
    options = {OPTIONS.get(key, key): value for key, value in variant["options"].items()}
    loss = OTHERS.get(name) or (lambda policy: registered(name.split(",")[0], policy, options))
    found, gradient = jax.value_and_grad(loss)(jnp.asarray(POLICY))
    expected = np.array(variant["gradient"])
    np.testing.assert_allclose(found, variant["loss"], rtol=1e-6 if name in ROUGH else 1e-7)
    distance = np.linalg.norm(gradient - expected) / np.linalg.norm(expected)
    assert distance < (1e-5 if name in ROUGH else 1e-7)
    assert np.count_nonzero(expected) > 10


def test_partners_have_the_same_rank_among_those_that_count():
    values, others = jnp.array([3.0, 9.0, 1.0, 2.0]), jnp.array([10.0, -50.0, 30.0, 20.0])
    counted = jnp.array([1.0, 0.0, 1.0, 1.0])
    found = transport.partners(values, others, counted)
    np.testing.assert_array_equal(found[jnp.array([0, 2, 3])], [30.0, 10.0, 20.0])
