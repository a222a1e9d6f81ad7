"""Batch losses and gradients with respect to token log-probabilities match TRL; see tests/goldens."""

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


def split_pairs(values):
    return values[:PAIRS], values[PAIRS:]


def logratios(policy):
    return jnp.sum(jnp.where(MASK, policy - REFERENCE, 0), axis=1)


def batch_of_pairs(policy) -> Example:
    """All pairs, stacked on a leading axis."""
    policy, reference, collision, mask = (
        jnp.stack(split_pairs(jnp.asarray(values)), axis=1) for values in (policy, REFERENCE, COLLISION, MASK)
    )
    lse = jnp.zeros_like(policy)
    stats, reference_stats = TokenStats(policy, lse, collision), TokenStats(reference, lse)
    return Example(policy=stats, references={"reference": reference_stats}, action_mask=mask)


def pair_loss(name, policy, options):
    """Mean loss of an objective over the pairs."""
    objective, example = OBJECTIVES[NAMES.get(name, name)].configure(beta=BETA, **options), batch_of_pairs(policy)
    if objective.couple:
        summaries = jax.vmap(objective.couple.summary)(example)
        combined = objective.couple.combine(summaries, jnp.ones(PAIRS))
        example = example._replace(coupled=jax.lax.stop_gradient(combined))
    out = jax.vmap(objective.loss)(example)
    return out.value.sum() / out.weight.sum()


def unpaired_sums(name, policy):
    """LossOut of an objective on single answers, summed; mismatched answers have one action with TRL's KL log-ratio."""
    sequences = [policy, REFERENCE]
    if mismatched := name == "kto":
        first_token = np.eye(MASK.shape[1])[0]
        mismatched_logp = np.tile(GOLDEN["kl"], 2)[:, None] * first_token
        sequences = [jnp.stack(both, axis=1) for both in ((policy, mismatched_logp), (REFERENCE, 0 * mismatched_logp))]
        masks = np.stack((MASK, np.tile(first_token > 0, (len(MASK), 1))), axis=1)
    else:
        sequences, masks = [jnp.asarray(x)[:, None] for x in sequences], MASK[:, None]
    labels = np.tile(np.arange(len(MASK)) < PAIRS, (2 if mismatched else 1, 1)).T
    stats, reference = (TokenStats(x, x) for x in sequences)
    example = Example(policy=stats, references={"reference": reference}, action_mask=jnp.asarray(masks), labels=labels)
    objective = OBJECTIVES[name].configure(beta=BETA, **GOLDEN["variants"][name]["options"])
    if mismatched:
        coupled = objective.couple.combine(jax.vmap(objective.couple.summary)(example), jnp.ones(len(MASK)))
        example = example._replace(coupled=jax.lax.stop_gradient(coupled))
    return jax.tree.map(jnp.sum, jax.vmap(objective.loss)(example))


def unpaired_loss(name):
    def loss(policy):
        out = unpaired_sums(name, policy)
        return out.value / out.weight

    return loss


def on_summed_logps(loss, with_lengths=False):
    def run(policy):
        sums = split_pairs(jnp.sum(jnp.where(MASK, policy, 0), axis=1))
        return loss(*sums, *(split_pairs(MASK.sum(1)) if with_lengths else ())).mean()

    return run


def orpo_odds_ratio_term(*arguments):
    averages = arguments[0] / arguments[2]
    return reference_free.orpo_loss(*arguments, beta=BETA) + averages


SPECIAL_CASES = {
    "kto": unpaired_loss("kto"),
    "apo_zero_unpaired": unpaired_loss("apo_zero_unpaired"),
    "cpo": on_summed_logps(lambda w, l: reference_free.cpo_loss(w, l, beta=BETA, alpha=0.0, label_smoothing=0.15)),
    "simpo": on_summed_logps(lambda *x: reference_free.simpo_loss(*x, beta=BETA, margin=0.3), with_lengths=True),
    "orpo": on_summed_logps(orpo_odds_ratio_term, with_lengths=True),
}
# TRL computes these in float32, and some constants of the others.
FLOAT32_IN_TRL = {"sigmoid, alpha_divergence", "orpo"}


@pytest.mark.parametrize("name", GOLDEN["variants"])
def test_loss_and_gradient_match_trl(name, x64):
    variant = GOLDEN["variants"][name]
    options = {OPTIONS.get(key, key): value for key, value in variant["options"].items()}
    loss = SPECIAL_CASES.get(name) or (lambda policy: pair_loss(name.split(",")[0], policy, options))
    actual, gradient = jax.value_and_grad(loss)(jnp.asarray(POLICY))
    expected = np.array(variant["gradient"])
    np.testing.assert_allclose(actual, variant["loss"], rtol=1e-6 if name in FLOAT32_IN_TRL else 1e-7)
    error = np.linalg.norm(gradient - expected) / np.linalg.norm(expected)
    assert error < (1e-5 if name in FLOAT32_IN_TRL else 1e-7)
    assert np.count_nonzero(expected) > 10


def test_unpaired_metrics_match_trl(x64):
    actual, expected = unpaired_sums("kto", jnp.asarray(POLICY)), GOLDEN["variants"]["kto"]["metrics"]
    assert actual.weight == 2 * PAIRS and actual.metrics["desirable"] == PAIRS
    for name, value in expected.items():
        np.testing.assert_allclose(actual.metrics[name] / actual.weight, value, rtol=1e-6, err_msg=name)
    actual = unpaired_sums("apo_zero_unpaired", jnp.asarray(POLICY))
    expected = GOLDEN["variants"]["apo_zero_unpaired"]["metrics"]
    # The batch has equally many desirable and undesirable answers.
    signed = (expected["rewards/chosen"] - expected["rewards/rejected"]) / 2
    np.testing.assert_allclose(actual.metrics["rewards/signed"] / actual.weight, signed, rtol=1e-6)


def test_match_by_rank_ignores_zero_weights():
    values, candidates = jnp.array([3.0, 9.0, 1.0, 2.0]), jnp.array([10.0, -50.0, 30.0, 20.0])
    weights = jnp.array([1.0, 0.0, 1.0, 1.0])
    actual = aot.match_by_rank(values, candidates, weights)
    np.testing.assert_array_equal(actual[jnp.array([0, 2, 3])], [30.0, 10.0, 20.0])
