"""What clip rules promise: a bound on every gradient, alone and in groups, and factors that are finite."""

import dataclasses
import functools
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shiq_jax.privacy import (
    AutoS,
    AutoV,
    ClipRule,
    DropAbove,
    FlatClip,
    Groupwise,
    NormalizedClip,
    clipped_sum,
    count_groups,
    per_example,
)
from shiq_jax.runs.private_options import _RULES, Privacy

RULES = (FlatClip, AutoS, AutoV, DropAbove, NormalizedClip)
NORMS = np.concatenate([[0.0], np.logspace(-30, 30, 241)]).astype(np.float32)
# Of all groups but the first, in units of the norm from which on rules shorten.
SHAPES = {"alike": 1.0, "nothing": 0.0, "just below": 0.99, "long": 1e6}


@dataclasses.dataclass(frozen=True)
class Direction(ClipRule):
    """A rule of somebody's, whose bound is 1 whatever its C."""

    sensitivity = 1.0

    def __call__(self, norms):
        return 1 / jnp.maximum(norms, 1e-12)


@pytest.mark.parametrize("norm", [1e-6, 0.3, 1.0, 50.0])
@pytest.mark.parametrize("rule", RULES)
def test_no_gradient_is_longer_than_the_sensitivity(rule, norm):
    rule = rule(norm)
    factors = np.asarray(rule(NORMS), np.float64)
    assert np.isfinite(factors).all() and (factors >= 0).all()
    lengths = factors * NORMS
    assert lengths.max() <= rule.sensitivity * (1 + 1e-6)
    # Nothing is left of the bound: noise is no larger than it must be.
    assert np.max(np.asarray(rule(np.float32([norm, 1e6 * norm]))) * [norm, 1e6 * norm]) > 0.99 * rule.sensitivity


@pytest.mark.parametrize("norm", [0.01, 0.5, 7.0])
def test_the_reparametrised_rule_is_abadis_over_the_clip_norm(norm):
    np.testing.assert_allclose(NormalizedClip(norm)(NORMS), FlatClip(norm)(NORMS) / norm, rtol=1e-6)
    assert NormalizedClip(norm).sensitivity == 1
    assert NormalizedClip(norm)(jnp.zeros(1)) == pytest.approx(1 / norm)


def test_the_reparametrised_sum_is_abadis_over_the_clip_norm():
    params, units = jnp.zeros(4), np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
    losses = per_example(lambda params, unit: params @ unit)
    assert 0 < np.sum(np.linalg.norm(units, axis=1) > 1.5) < 8
    found, wanted = (clipped_sum(losses, params, units, clip=rule(1.5))[0] for rule in (NormalizedClip, FlatClip))
    np.testing.assert_allclose(found, wanted / 1.5, rtol=1e-5)


@pytest.mark.parametrize("others", SHAPES)
@pytest.mark.parametrize("groups", [1, 3, 64])
@pytest.mark.parametrize("rule", [*RULES, Direction])
def test_all_groups_together_are_no_longer_than_the_sensitivity(rule, groups, others):
    clip = Groupwise(rule(0.5), groups)
    norms = np.full(groups, 0.5 / np.sqrt(groups), np.float32)
    norms[1:] *= SHAPES[others]
    assert np.linalg.norm(clip.per_group(norms) * norms) <= clip.sensitivity * (1 + 1e-5)
    # All groups long at once is the worst, and no better than was said.
    if rule is not DropAbove:
        long = np.full(groups, 1e6, np.float32)
        assert np.linalg.norm(clip.per_group(long) * long) == pytest.approx(clip.sensitivity, rel=1e-5)


@pytest.mark.parametrize("groups", [1, 3, 64])
def test_groups_leave_the_sensitivity_of_a_rule_as_it_is(groups):
    for rule in RULES:
        assert Groupwise(rule(0.3), groups).sensitivity == pytest.approx(rule(0.3).sensitivity)
    # But for a rule that does not know how to share its bound; then each group has all of it.
    assert Groupwise(Direction(), groups).sensitivity == pytest.approx(np.sqrt(groups))


@pytest.mark.parametrize("groups", [1, 3, 64])
def test_the_reparametrised_rule_of_a_group_is_abadis_over_the_clip_norm(groups):
    found, wanted = (Groupwise(rule(0.3), groups).per_group(NORMS) for rule in (NormalizedClip, FlatClip))
    np.testing.assert_allclose(found, wanted / 0.3, rtol=1e-6)


def test_the_reparametrised_rule_by_operations(decoder, batch_of, example_losses, relative):
    """A tied table, whose two uses share a group, and what one unit can do."""
    model, params = decoder("tied")
    batch, losses, groups = batch_of("pair"), example_losses(model, "pair"), count_groups(params)

    @functools.partial(jax.jit, static_argnums=0)
    def total(rule, mask):
        return clipped_sum(losses, params, batch, clip=Groupwise(rule, groups), mask=mask, method="group")[0]

    every = np.ones(len(batch.tokens), bool)
    found, wanted = total(NormalizedClip(0.7), every), total(FlatClip(0.7), every)
    assert relative(found, {name: _scaled(part, 1 / 0.7) for name, part in wanted.items()}) < 1e-5
    alone = total(NormalizedClip(0.7), np.arange(len(batch.tokens)) == 1)
    assert 0.5 < _length(alone) <= 1 + 1e-4


def test_auto_s_keeps_what_small_gradients_were_and_forgets_the_scale_of_others():
    rule = AutoS(1.0)
    lengths = np.asarray(rule(NORMS), np.float64) * NORMS
    np.testing.assert_allclose(lengths, NORMS / (NORMS + np.float64(rule.numerical_stability)), rtol=1e-5)
    some = np.float32([1.0, 5.0, 30.0])
    np.testing.assert_allclose(rule(1e4 * some) * 1e4, rule(some), rtol=2 * rule.numerical_stability)


def test_every_rule_is_an_option():
    assert set(_RULES) == set(typing.get_args(typing.get_type_hints(Privacy)["clip"]))
    assert set(_RULES.values()) == set(RULES)


@pytest.mark.parametrize("groupwise", [False, True])
def test_the_reparametrised_rule_as_an_option(groupwise):
    options = Privacy(noise_multiplier=1.5, delta=1e-5, clip="normalized", clip_norm=0.2, groupwise=groupwise)
    trainable = {"layers": {"kernel": np.zeros((3, 2, 2))}, "norm": np.zeros(2)}
    mechanism = options.mechanism(
        trainable, dataset_size=100, expected_batch=10, steps=5, multiple=1, example="trajectory"
    )
    assert mechanism.clip == (Groupwise(NormalizedClip(0.2), 4) if groupwise else NormalizedClip(0.2))
    assert mechanism.noise_stddev == pytest.approx(1.5)


@pytest.mark.parametrize("wrong", [{"clip_norm": 0.0}, {"longest": 0.0}, {"longest": np.inf}])
def test_bounds_that_are_none_are_refused(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be positive and finite"):
        NormalizedClip(**wrong)


def _scaled(tree, by):
    return {name: _scaled(part, by) for name, part in tree.items()} if hasattr(tree, "items") else tree * by


def _length(tree):
    if hasattr(tree, "items"):
        return np.sqrt(sum(_length(part) ** 2 for part in tree.values()))
    return np.linalg.norm(tree)
