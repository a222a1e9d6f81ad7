"""Options that pair losses share: what each does to value and gradient, and which losses refuse it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shiq_jax.objectives import OBJECTIVES, Example, TokenStats, token_stats_from_logits
from shiq_jax.objectives.pair_options import PairOptions

PAIRS = {name: objective for name, objective in OBJECTIVES.items() if objective.unit == "pair"}
ONES = {"rpo_alpha": 0.7, "ld_alpha": 0.4, "use_weighting": True, "f_divergence": "js_divergence"}
# Of log-ratios alone, and of their difference alone.
CONTRASTS = {"dpo", "robust", "hinge", "exo", "discopop"}
SUMS = CONTRASTS | {"dpop", "nca", "bco", "sppo_hard", "apo_zero", "apo_down"}
TAKERS = {
    "rpo_alpha": PAIRS.keys() - {"cpo", "orpo"},
    "ld_alpha": SUMS,
    "use_weighting": PAIRS.keys() - {"aot", "aot_unpaired"},
    "f_divergence": CONTRASTS,
    "f_alpha": CONTRASTS,
}
SINGLE = sorted(name for name, objective in PAIRS.items() if objective.couple is None)
MASK = np.array([[0, 1, 1, 0, 1, 1, 1, 0], [1, 0, 0, 1, 1, 0, 0, 0]], bool)


def draw(seed=0) -> tuple[jax.Array, Example]:
    """Raw logits of a pair and, under them, the pair itself: 5 actions against 3."""
    random = np.random.default_rng(seed)
    logits, others = random.normal(size=(2, *MASK.shape, 9))
    tokens, rewards = random.integers(9, size=MASK.shape), random.normal(size=MASK.shape)
    policy = token_stats_from_logits(logits, tokens)._replace(lse2=jax.nn.logsumexp(2 * logits, axis=-1))
    references = {"reference": token_stats_from_logits(others, tokens)}
    return logits, Example(policy=policy, references=references, action_mask=MASK, rewards=rewards)


def run(name, example, **options):
    """The objective's sums, and the gradient of its value to every log-probability of the policy."""
    loss = OBJECTIVES[name].configure(**options).loss

    def value(logp):
        out = loss(example._replace(policy=example.policy._replace(logp=logp)))
        return out.value, out

    gradient, out = jax.grad(value, has_aux=True)(example.policy.logp)
    return out, gradient


@pytest.mark.parametrize("name", PAIRS)
def test_takes_what_makes_sense_for_it_and_refuses_the_rest_in_a_sentence(name):
    assert TAKERS.keys() == set(PairOptions._fields)
    for option, takers in TAKERS.items():
        assert (option in PAIRS[name].options) == (name in takers)
        if name not in takers:
            with pytest.raises(ValueError, match=f"option '{option}' is none of the objective '{name}', which takes b"):
                PAIRS[name].configure(**{option: ONES.get(option, 0.5)})
    assert PAIRS[name].statistics == ()
    if name in TAKERS["use_weighting"]:
        assert PAIRS[name].configure(use_weighting=True).statistics == ("lse2",)


@pytest.mark.parametrize("name", sorted(TAKERS["rpo_alpha"] & set(SINGLE)))
def test_likelihood_is_added_per_action(name, x64):
    _, pair = draw()
    plain, before = run(name, pair)
    found, after = run(name, pair, rpo_alpha=0.7)
    nll = -np.asarray(pair.policy.logp)[0, MASK[0]].mean()
    np.testing.assert_allclose(found.value, plain.value + 0.7 * nll, rtol=1e-12)
    np.testing.assert_allclose(found.metrics["nll/chosen"], nll, rtol=1e-12)
    np.testing.assert_allclose(after - before, -0.7 / 5 * MASK * np.array([[1], [0]]), atol=1e-12)


@pytest.mark.parametrize("name", sorted(SUMS))
def test_late_actions_count_for_less(name, x64):
    """With 1 all count; with 0 the pair is one whose longer completion was cut to the length of the shorter."""
    _, pair = draw()
    for found, expected in zip(run(name, pair, ld_alpha=1.0), run(name, pair), strict=True):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14), found, expected)
    cut = pair._replace(action_mask=MASK & (np.cumsum(MASK, axis=1) <= 3))
    for found, expected in zip(run(name, pair, ld_alpha=0.0), run(name, cut), strict=True):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14), found, expected)


@pytest.mark.parametrize("name", sorted(TAKERS["use_weighting"]))
def test_pairs_weigh_as_much_as_the_policy_would_write_them(name, x64):
    """exp of the mean over actions of log pi - log sum_a pi(a)^2, of both completions, here from all probabilities."""
    logits, pair = draw()
    collision = np.log(np.sum(np.asarray(jax.nn.softmax(logits)) ** 2, axis=-1))
    weight = np.prod(np.exp(np.mean(pair.policy.logp - collision, axis=1, where=MASK)))
    more = {"rpo_alpha": 0.7} if name in TAKERS["rpo_alpha"] else {}
    plain, before = run(name, pair, **more)
    found, after = run(name, pair, use_weighting=True, **more)
    np.testing.assert_allclose(found.value, weight * plain.value, rtol=1e-12)
    np.testing.assert_allclose(after, weight * before, rtol=1e-10, atol=1e-14)
    np.testing.assert_allclose(found.metrics["weight/pair"], weight, rtol=1e-12)
    assert found.weight == 1


@pytest.mark.parametrize("name", sorted(CONTRASTS))
@pytest.mark.parametrize(
    "divergence, slope",
    [
        ({"f_divergence": "forward_kl"}, 1.0),
        ({"f_divergence": "js_divergence"}, 0.5),
        ({"f_divergence": "alpha_divergence", "f_alpha": 0.5}, 1.0),
    ],
)
def test_divergences_agree_at_the_reference_but_for_their_slope(name, divergence, slope, x64):
    """There the loss is that of no margin, and its gradient differs by the slope of the score at 0."""
    _, pair = draw()
    there = pair._replace(references={"reference": pair.policy})
    (found, after), (plain, before) = run(name, there, **divergence), run(name, there)
    np.testing.assert_allclose(found.value, plain.value, rtol=1e-12)
    np.testing.assert_allclose(after, slope * before, rtol=1e-12, atol=1e-14)
    away, _ = run(name, pair, **divergence)
    assert abs(away.value - run(name, pair)[0].value) > 1e-4
    # What is reported stays beta times the log-ratio.
    assert away.metrics == run(name, pair)[0].metrics


def test_the_family_of_alpha_holds_the_others(x64):
    _, pair = draw()
    at_one, _ = run("dpo", pair, f_divergence="alpha_divergence", f_alpha=1.0)
    assert at_one.value == run("dpo", pair)[0].value
    at_zero, _ = run("dpo", pair, f_divergence="alpha_divergence", f_alpha=0.0)
    np.testing.assert_allclose(at_zero.value, run("dpo", pair, f_divergence="forward_kl")[0].value, rtol=1e-12)


def test_coupled_losses_take_the_likelihood_alone(x64):
    _, pair = draw()
    for name, coupled in (("aot", jnp.asarray(0.3)), ("aot_unpaired", (jnp.asarray(0.3), jnp.asarray(-0.2)))):
        given = pair._replace(coupled=coupled)
        difference = run(name, given, rpo_alpha=0.7)[0].value - run(name, given)[0].value
        np.testing.assert_allclose(difference, -0.7 * np.asarray(pair.policy.logp)[0, MASK[0]].mean(), rtol=1e-12)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"rpo_alpha": -1.0}, "rpo_alpha is -1.0"),
        ({"ld_alpha": 1.5}, r"ld_alpha is 1.5 but must lie in \[0, 1\]"),
        ({"f_divergence": "kl"}, "f_divergence is 'kl' but must be one of 'reverse_kl'"),
        ({"f_alpha": 0.5}, "f_alpha is 0.5 with f_divergence='reverse_kl'"),
        ({"f_divergence": "alpha_divergence"}, "f_alpha is None with f_divergence='alpha_divergence'"),
        ({"f_divergence": "alpha_divergence", "f_alpha": np.inf}, "f_alpha is inf"),
    ],
)
def test_options_out_of_range_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        run("dpo", draw()[1], **options)


def test_weighting_names_the_statistic_that_is_missing():
    _, pair = draw()
    without = pair._replace(policy=TokenStats(pair.policy.logp, pair.policy.lse))
    with pytest.raises(ValueError, match="policy.lse2 is missing"):
        run("dpo", without, use_weighting=True)
