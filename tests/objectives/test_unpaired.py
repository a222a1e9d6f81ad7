"""KTO and its like on examples: published numbers, what couples them, what they report and what gets no gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shiq_jax.objectives import OBJECTIVES, Example, TokenStats

BETA = 0.5


def examples(logratios, mismatched, labels, actions=2) -> Example:
    """Answers of these log-ratios, spread over their actions, each beside a mismatched one; NaN where nothing acts."""
    sums = np.stack([np.asarray(logratios), np.asarray(mismatched)], axis=1)
    mask = np.broadcast_to(np.arange(4) < actions, (*sums.shape, 4))
    reference = np.where(mask, -3.0, np.nan)
    policy = np.where(mask, sums[..., None] / max(actions, 1) - 3.0, np.nan)
    labels = np.stack([labels, np.ones(len(labels), bool)], axis=1)
    stats = TokenStats(policy, policy), TokenStats(reference, reference)
    return Example(policy=stats[0], references={"reference": stats[1]}, action_mask=mask, labels=labels)


def summed(example, weights=None, **options):
    """What KTO makes of a whole batch."""
    objective = OBJECTIVES["kto"].configure(beta=BETA, **options)
    weights = jnp.ones(len(example.labels)) if weights is None else weights
    coupled = objective.couple.combine(jax.vmap(objective.couple.summary)(example), weights)
    out = jax.vmap(objective.loss)(example._replace(coupled=coupled))
    return jax.tree.map(lambda x: jnp.sum(jnp.where(weights > 0, x, 0)), out), coupled


def test_published_numbers(x64):
    for logratio, good, kto, apo in ((0.8, True, 0.413382, 0.401312), (-0.4, False, 0.437823, 0.450166)):
        example = examples([logratio], [0.1], [good])
        np.testing.assert_allclose(summed(example)[0].value, kto, atol=2e-6)
        alone = jax.tree.map(lambda x: x[0, :1], example)
        out = OBJECTIVES["apo_zero_unpaired"].configure(beta=BETA).loss(alone)
        np.testing.assert_allclose((out.value, out.weight), (apo, 1), atol=2e-6)


def test_the_kl_is_a_mean_over_what_is_real_and_never_negative(x64):
    example = examples([0.8, -0.4, 0.3], [0.5, -0.3, 77.0], [True, False, True])
    _, coupled = summed(example, jnp.array([1.0, 1.0, 0.0]))
    np.testing.assert_allclose(coupled["kl"], 0.1)
    _, coupled = summed(examples([0.8, -0.4], [0.5, -0.7], [True, False]))
    np.testing.assert_array_equal(coupled["kl"], 0)


def test_only_the_answer_has_a_gradient(x64):
    example = examples([0.8, -0.4], [0.5, 0.3], [True, False])

    def loss(logp):
        policy = TokenStats(logp, example.policy.lse)
        return summed(example._replace(policy=policy))[0].value

    # The update step stops what couples examples; here it is stopped by the loss itself.
    gradient = jax.grad(loss)(jnp.asarray(example.policy.logp))
    assert not np.any(gradient[:, 1]) and np.all(gradient[:, 0, :2]) and not np.any(gradient[:, 0, 2:])
    assert gradient[0, 0, 0] < 0 < gradient[1, 0, 0]


def test_metrics_are_means_over_the_answers_of_a_kind(x64):
    good, bad = [0.8, 0.2, -0.3], [-0.4]
    out, _ = summed(examples(good + bad, [0.4] * 4, [True] * 3 + [False]))
    means = {name: float(value / out.weight) for name, value in out.metrics.items()}
    expected = {"rewards/chosen": BETA * np.mean(good), "rewards/rejected": BETA * np.mean(bad)}
    expected |= {"rewards/margins": expected["rewards/chosen"] - expected["rewards/rejected"], "kl": 0.4}
    assert means == pytest.approx(expected | {"desirable": 0.75}, rel=1e-9)
    out, _ = summed(examples(good, [0.4] * 3, [True] * 3))
    assert out.metrics["rewards/rejected"] == 0 and out.metrics["desirable"] == 3


def test_weights_of_either_kind(x64):
    plain = [float(summed(examples([x], [0.1], [good]))[0].value) for x, good in ((0.8, True), (-0.4, False))]
    weighted, _ = summed(examples([0.8, -0.4], [0.1, 0.1], [True, False]), desirable_weight=3.0, undesirable_weight=5.0)
    assert weighted.value == pytest.approx(3 * plain[0] + 5 * plain[1]) and weighted.weight == 2


def test_an_answer_without_actions_counts_for_nothing():
    out, coupled = summed(examples([0.0], [0.0], [True], actions=0))
    assert not any(np.asarray(x).any() for x in jax.tree.leaves(out))
    assert np.isfinite(jax.tree.leaves(coupled)).all()


def test_other_examples_are_refused():
    one = jax.tree.map(lambda x: x[0], examples([0.8], [0.1], [True]))
    with pytest.raises(ValueError, match="Example.coupled is None but objective 'kto' needs it"):
        OBJECTIVES["kto"].loss(one)
    with pytest.raises(ValueError, match="Example.labels is None"):
        OBJECTIVES["kto"].loss(one._replace(labels=None))
    alone = jax.tree.map(lambda x: x[:1], one)
    with pytest.raises(ValueError, match=r"shape \(1, 4\) but kto takes an answer and a mismatched one"):
        OBJECTIVES["kto"].loss(alone._replace(coupled=0))
