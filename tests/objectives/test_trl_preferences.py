"""Losses and their gradients are TRL's, of whole batches and to every token's log-probability; see tests/goldens."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shiq_jax.objectives import OBJECTIVES, Example, TokenStats, aot, reference_free

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


def labelled(name, policy):
    """The batch's sums of an objective on single answers; mismatched ones of one action say what TRL was told."""
    sequences = [policy, REFERENCE]
    if mismatched := name == "kto":
        first = np.eye(MASK.shape[1])[0]
        others = np.tile(GOLDEN["kl"], 2)[:, None] * first
        sequences = [jnp.stack(both, axis=1) for both in ((policy, others), (REFERENCE, 0 * others))]
        masks = np.stack((MASK, np.tile(first > 0, (len(MASK), 1))), axis=1)
    else:
        sequences, masks = [jnp.asarray(x)[:, None] for x in sequences], MASK[:, None]
    labels = np.tile(np.arange(len(MASK)) < PAIRS, (2 if mismatched else 1, 1)).T
    stats, reference = (TokenStats(x, x) for x in sequences)
    example = Example(policy=stats, references={"reference": reference}, action_mask=jnp.asarray(masks), labels=labels)
    objective = OBJECTIVES[name].configure(beta=BETA, **GOLDEN["variants"][name]["options"])
    if mismatched:
        known = objective.couple.combine(jax.vmap(objective.couple.summary)(example), jnp.ones(len(MASK)))
        example = example._replace(coupled=jax.lax.stop_gradient(known))
    return jax.tree.map(jnp.sum, jax.vmap(objective.loss)(example))


def by_label(name):
    def loss(policy):
        out = labelled(name, policy)
        return out.value / out.weight

    return loss


def on_sums(loss, averaged=False):
    def run(policy):
        sums = halves(jnp.sum(jnp.where(MASK, policy, 0), axis=1))
        return loss(*sums, *(halves(MASK.sum(1)) if averaged else ())).mean()

    return run


def orpo_contrast(*arguments):
    averages = arguments[0] / arguments[2]
    return reference_free.orpo_loss(*arguments, beta=BETA) + averages


OTHERS = {
    "kto": by_label("kto"),
    "apo_zero_unpaired": by_label("apo_zero_unpaired"),
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


def test_metrics_of_labelled_answers_are_those_of_trl(x64):
    found, theirs = labelled("kto", jnp.asarray(POLICY)), GOLDEN["variants"]["kto"]["metrics"]
    assert found.weight == 2 * PAIRS and found.metrics["desirable"] == PAIRS
    for name, value in theirs.items():
        np.testing.assert_allclose(found.metrics[name] / found.weight, value, rtol=1e-6, err_msg=name)
    alone, theirs = (
        labelled("apo_zero_unpaired", jnp.asarray(POLICY)),
        GOLDEN["variants"]["apo_zero_unpaired"]["metrics"],
    )
    # As many are good as bad.
    signed = (theirs["rewards/chosen"] - theirs["rewards/rejected"]) / 2
    np.testing.assert_allclose(alone.metrics["rewards/signed"] / alone.weight, signed, rtol=1e-6)


def test_partners_have_the_same_rank_among_those_that_count():
    values, others = jnp.array([3.0, 9.0, 1.0, 2.0]), jnp.array([10.0, -50.0, 30.0, 20.0])
    counted = jnp.array([1.0, 0.0, 1.0, 1.0])
    found = aot.partners(values, others, counted)
    np.testing.assert_array_equal(found[jnp.array([0, 2, 3])], [30.0, 10.0, 20.0])
