"""KTO and unpaired APO on examples: values computed by hand, the KL estimate, gradients and metrics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shiq_jax.objectives import OBJECTIVES, Example, TokenStats

BETA = 0.5


def examples(logratios, mismatched, labels, actions=2) -> Example:
    """Answers with these log-ratios spread over their actions, each with a mismatched answer; masked tokens are NaN."""
    sums = np.stack([np.asarray(logratios), np.asarray(mismatched)], axis=1)
    mask = np.broadcast_to(np.arange(4) < actions, (*sums.shape, 4))
    reference = np.where(mask, -3.0, np.nan)
    policy = np.where(mask, sums[..., None] / max(actions, 1) - 3.0, np.nan)
    labels = np.stack([labels, np.ones(len(labels), bool)], axis=1)
    stats = TokenStats(policy, policy), TokenStats(reference, reference)
    return Example(policy=stats[0], references={"reference": stats[1]}, action_mask=mask, labels=labels)


def kto_sums(example, weights=None, **options):
    """Summed LossOut of KTO over a batch, and its coupled values."""
    objective = OBJECTIVES["kto"].configure(beta=BETA, **options)
    weights = jnp.ones(len(example.labels)) if weights is None else weights
    coupled = objective.couple.combine(jax.vmap(objective.couple.summary)(example), weights)
    out = jax.vmap(objective.loss)(example._replace(coupled=coupled))
    return jax.tree.map(lambda x: jnp.sum(jnp.where(weights > 0, x, 0)), out), coupled


def test_values_computed_by_hand(x64):
    for logratio, desirable, kto, apo in ((0.8, True, 0.413382, 0.401312), (-0.4, False, 0.437823, 0.450166)):
        example = examples([logratio], [0.1], [desirable])
        np.testing.assert_allclose(kto_sums(example)[0].value, kto, atol=2e-6)
        answer = jax.tree.map(lambda x: x[0, :1], example)
        out = OBJECTIVES["apo_zero_unpaired"].configure(beta=BETA).loss(answer)
        np.testing.assert_allclose((out.value, out.weight), (apo, 1), atol=2e-6)


def test_kl_is_a_clipped_mean_over_weighted_examples(x64):
    example = examples([0.8, -0.4, 0.3], [0.5, -0.3, 77.0], [True, False, True])
    _, coupled = kto_sums(example, jnp.array([1.0, 1.0, 0.0]))
    np.testing.assert_allclose(coupled["kl"], 0.1)
    _, coupled = kto_sums(examples([0.8, -0.4], [0.5, -0.7], [True, False]))
    np.testing.assert_array_equal(coupled["kl"], 0)


def test_only_the_answer_has_a_gradient(x64):
    example = examples([0.8, -0.4], [0.5, 0.3], [True, False])

    def loss(logp):
        policy = TokenStats(logp, example.policy.lse)
        return kto_sums(example._replace(policy=policy))[0].value

    # The update step detaches `coupled`; the loss does so as well.
    gradient = jax.grad(loss)(jnp.asarray(example.policy.logp))
    assert not np.any(gradient[:, 1]) and np.all(gradient[:, 0, :2]) and not np.any(gradient[:, 0, 2:])
    assert gradient[0, 0, 0] < 0 < gradient[1, 0, 0]


def test_metrics_are_means_per_label(x64):
    desirable, undesirable = [0.8, 0.2, -0.3], [-0.4]
    out, _ = kto_sums(examples(desirable + undesirable, [0.4] * 4, [True] * 3 + [False]))
    means = {name: float(value / out.weight) for name, value in out.metrics.items()}
    expected = {"rewards/chosen": BETA * np.mean(desirable), "rewards/rejected": BETA * np.mean(undesirable)}
    expected |= {"rewards/margins": expected["rewards/chosen"] - expected["rewards/rejected"], "kl": 0.4}
    assert means == pytest.approx(expected | {"desirable": 0.75}, rel=1e-9)
    out, _ = kto_sums(examples(desirable, [0.4] * 3, [True] * 3))
    assert out.metrics["rewards/rejected"] == 0 and out.metrics["desirable"] == 3


def test_label_weights(x64):
    unweighted = [
        float(kto_sums(examples([x], [0.1], [desirable]))[0].value) for x, desirable in ((0.8, True), (-0.4, False))
    ]
    weighted, _ = kto_sums(
        examples([0.8, -0.4], [0.1, 0.1], [True, False]), desirable_weight=3.0, undesirable_weight=5.0
    )
    assert weighted.value == pytest.approx(3 * unweighted[0] + 5 * unweighted[1]) and weighted.weight == 2


def test_answers_without_actions_are_ignored():
    out, coupled = kto_sums(examples([0.0], [0.0], [True], actions=0))
    assert not any(np.asarray(x).any() for x in jax.tree.leaves(out))
    assert np.isfinite(jax.tree.leaves(coupled)).all()


def test_invalid_examples_are_rejected():
    example = jax.tree.map(lambda x: x[0], examples([0.8], [0.1], [True]))
    with pytest.raises(ValueError, match="Example.coupled is None but objective 'kto' requires it"):
        OBJECTIVES["kto"].loss(example)
    with pytest.raises(ValueError, match="Example.labels is None"):
        OBJECTIVES["kto"].loss(example._replace(labels=None))
    single = jax.tree.map(lambda x: x[:1], example)
    with pytest.raises(ValueError, match=r"shape \(1, 4\) but kto takes an answer and a mismatched one"):
        OBJECTIVES["kto"].loss(single._replace(coupled=0))
