"""Shared options of pair losses: effect on value and gradient, and the losses that support each."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shiq_jax.objectives import OBJECTIVES, Example, TokenStats, token_stats_from_logits
from shiq_jax.objectives.pair_options import PairOptions

PAIRS = {name: objective for name, objective in OBJECTIVES.items() if objective.unit == "pair"}
VALUES = {"rpo_alpha": 0.7, "ld_alpha": 0.4, "use_weighting": True, "f_divergence": "js_divergence"}
# Losses of the difference of the log-ratios, and losses of the log-ratios alone.
DIFFERENCE_LOSSES = {"dpo", "robust", "hinge", "exo", "discopop"}
LOGRATIO_LOSSES = DIFFERENCE_LOSSES | {"dpop", "nca", "bco", "sppo_hard", "apo_zero", "apo_down"}
SUPPORTED = {
    "rpo_alpha": PAIRS.keys() - {"cpo", "orpo"},
    "ld_alpha": LOGRATIO_LOSSES,
    "use_weighting": PAIRS.keys() - {"aot", "aot_unpaired"},
    "f_divergence": DIFFERENCE_LOSSES,
    "f_alpha": DIFFERENCE_LOSSES,
}
UNCOUPLED = sorted(name for name, objective in PAIRS.items() if objective.couple is None)
MASK = np.array([[0, 1, 1, 0, 1, 1, 1, 0], [1, 0, 0, 1, 1, 0, 0, 0]], bool)


def random_pair(seed=0) -> tuple[jax.Array, Example]:
    """Random logits and the example of a pair with 5 and 3 actions."""
    random = np.random.default_rng(seed)
    logits, reference_logits = random.normal(size=(2, *MASK.shape, 9))
    tokens, rewards = random.integers(9, size=MASK.shape), random.normal(size=MASK.shape)
    policy = token_stats_from_logits(logits, tokens)._replace(lse2=jax.nn.logsumexp(2 * logits, axis=-1))
    references = {"reference": token_stats_from_logits(reference_logits, tokens)}
    return logits, Example(policy=policy, references=references, action_mask=MASK, rewards=rewards)


def run(name, example, **options):
    """The LossOut of an objective, and the gradient with respect to the log-probabilities of the policy."""
    loss = OBJECTIVES[name].configure(**options).loss

    def value(logp):
        out = loss(example._replace(policy=example.policy._replace(logp=logp)))
        return out.value, out

    gradient, out = jax.grad(value, has_aux=True)(example.policy.logp)
    return out, gradient


@pytest.mark.parametrize("name", PAIRS)
def test_unsupported_options_are_rejected(name):
    assert SUPPORTED.keys() == set(PairOptions._fields)
    for option, losses in SUPPORTED.items():
        assert (option in PAIRS[name].options) == (name in losses)
        if name not in losses:
            with pytest.raises(ValueError, match=f"objective '{name}' has no option '{option}'; its options are b"):
                PAIRS[name].configure(**{option: VALUES.get(option, 0.5)})
    assert PAIRS[name].extra_stats == ()
    if name in SUPPORTED["use_weighting"]:
        assert PAIRS[name].configure(use_weighting=True).extra_stats == ("lse2",)


@pytest.mark.parametrize("name", sorted(SUPPORTED["rpo_alpha"] & set(UNCOUPLED)))
def test_rpo_alpha_adds_the_likelihood_per_action(name, x64):
    _, pair = random_pair()
    plain, plain_gradient = run(name, pair)
    out, gradient = run(name, pair, rpo_alpha=0.7)
    nll = -np.asarray(pair.policy.logp)[0, MASK[0]].mean()
    np.testing.assert_allclose(out.value, plain.value + 0.7 * nll, rtol=1e-12)
    np.testing.assert_allclose(out.metrics["nll/chosen"], nll, rtol=1e-12)
    np.testing.assert_allclose(gradient - plain_gradient, -0.7 / 5 * MASK * np.array([[1], [0]]), atol=1e-12)


@pytest.mark.parametrize("name", sorted(LOGRATIO_LOSSES))
def test_ld_alpha_scales_actions_beyond_the_shorter_completion(name, x64):
    """1 changes nothing; 0 equals truncating the longer completion to the length of the shorter."""
    _, pair = random_pair()
    chex.assert_trees_all_close(run(name, pair, ld_alpha=1.0), run(name, pair), rtol=1e-12, atol=1e-14)
    truncated = pair._replace(action_mask=MASK & (np.cumsum(MASK, axis=1) <= 3))
    chex.assert_trees_all_close(run(name, pair, ld_alpha=0.0), run(name, truncated), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", sorted(SUPPORTED["use_weighting"]))
def test_use_weighting_multiplies_by_the_wpo_weights(name, x64):
    """The weight is computed here from the full distributions."""
    logits, pair = random_pair()
    collision = np.log(np.sum(np.asarray(jax.nn.softmax(logits)) ** 2, axis=-1))
    weight = np.prod(np.exp(np.mean(pair.policy.logp - collision, axis=1, where=MASK)))
    options = {"rpo_alpha": 0.7} if name in SUPPORTED["rpo_alpha"] else {}
    plain, plain_gradient = run(name, pair, **options)
    out, gradient = run(name, pair, use_weighting=True, **options)
    np.testing.assert_allclose(out.value, weight * plain.value, rtol=1e-12)
    np.testing.assert_allclose(gradient, weight * plain_gradient, rtol=1e-10, atol=1e-14)
    np.testing.assert_allclose(out.metrics["weight/pair"], weight, rtol=1e-12)
    assert out.weight == 1


@pytest.mark.parametrize("name", sorted(DIFFERENCE_LOSSES))
@pytest.mark.parametrize(
    "divergence, slope",
    [
        ({"f_divergence": "forward_kl"}, 1.0),
        ({"f_divergence": "js_divergence"}, 0.5),
        ({"f_divergence": "alpha_divergence", "f_alpha": 0.5}, 1.0),
    ],
)
def test_divergences_at_the_reference_differ_only_in_slope(name, divergence, slope, x64):
    """At policy = reference the losses are equal and the gradients differ by the slope of the score at 0."""
    _, pair = random_pair()
    at_reference = pair._replace(references={"reference": pair.policy})
    out, gradient = run(name, at_reference, **divergence)
    plain, plain_gradient = run(name, at_reference)
    np.testing.assert_allclose(out.value, plain.value, rtol=1e-12)
    np.testing.assert_allclose(gradient, slope * plain_gradient, rtol=1e-12, atol=1e-14)
    (out, _), (plain, _) = run(name, pair, **divergence), run(name, pair)
    assert abs(out.value - plain.value) > 1e-4
    # The reported rewards remain beta times the log-ratio.
    assert out.metrics == plain.metrics


def test_alpha_divergence_contains_both_kl_divergences(x64):
    _, pair = random_pair()
    alpha_one, _ = run("dpo", pair, f_divergence="alpha_divergence", f_alpha=1.0)
    assert alpha_one.value == run("dpo", pair)[0].value
    alpha_zero, _ = run("dpo", pair, f_divergence="alpha_divergence", f_alpha=0.0)
    np.testing.assert_allclose(alpha_zero.value, run("dpo", pair, f_divergence="forward_kl")[0].value, rtol=1e-12)


@pytest.mark.parametrize("alpha", [1 - 1e-9, 1 + 1e-9, 1 + 1e-4])
def test_alpha_divergence_is_continuous_at_one(alpha):
    """In float32: value and gradient near alpha = 1 are those of the limit, to the order of alpha - 1."""
    _, pair = random_pair()
    (near, near_gradient), (limit, limit_gradient) = (
        run("dpo", pair, f_divergence="alpha_divergence", f_alpha=value) for value in (alpha, 1.0)
    )
    np.testing.assert_allclose(near.value, limit.value, rtol=1e-3)
    np.testing.assert_allclose(near_gradient, limit_gradient, rtol=5e-3, atol=1e-6)


def test_rpo_alpha_with_coupled_losses(x64):
    _, pair = random_pair()
    for name, coupled in (("aot", jnp.asarray(0.3)), ("aot_unpaired", (jnp.asarray(0.3), jnp.asarray(-0.2)))):
        example = pair._replace(coupled=coupled)
        difference = run(name, example, rpo_alpha=0.7)[0].value - run(name, example)[0].value
        np.testing.assert_allclose(difference, -0.7 * np.asarray(pair.policy.logp)[0, MASK[0]].mean(), rtol=1e-12)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rpo_alpha": -1.0}, "rpo_alpha is -1.0"),
        ({"ld_alpha": 1.5}, r"ld_alpha is 1.5 but must lie in \[0, 1\]"),
        ({"f_divergence": "kl"}, "f_divergence is 'kl' but must be one of 'reverse_kl'"),
        ({"f_alpha": 0.5}, "f_alpha is 0.5 with f_divergence='reverse_kl'"),
        ({"f_divergence": "alpha_divergence"}, "f_alpha is None with f_divergence='alpha_divergence'"),
        ({"f_divergence": "alpha_divergence", "f_alpha": np.inf}, "f_alpha is inf"),
    ],
)
def test_invalid_options_are_rejected(options, message):
    with pytest.raises(ValueError, match=message):
        run("dpo", random_pair()[1], **options)


def test_use_weighting_requires_lse2():
    _, pair = random_pair()
    without_lse2 = pair._replace(policy=TokenStats(pair.policy.logp, pair.policy.lse))
    with pytest.raises(ValueError, match="policy.lse2 is missing"):
        run("dpo", without_lse2, use_weighting=True)
