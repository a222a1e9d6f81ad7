"""Clip rules: finite factors, sensitivity alone and group-wise, and their command-line options."""

import dataclasses
import functools
import typing

import jax
import jax.numpy as jnp
import numpy as np
import optax
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
# Norm of every group but the first, over the norm at which it is clipped.
GROUP_NORMS = {"equal": 1.0, "zero": 0.0, "just below": 0.99, "large": 1e6}


@dataclasses.dataclass(frozen=True)
class UnitNorm(ClipRule):
    """A user-defined rule whose sensitivity is 1 for any C."""

    sensitivity = 1.0

    def __call__(self, norms):
        return 1 / jnp.maximum(norms, 1e-12)


@pytest.mark.parametrize("norm", [1e-6, 0.3, 1.0, 50.0])
@pytest.mark.parametrize("rule", RULES)
def test_scaled_norm_is_within_sensitivity(rule, norm):
    rule = rule(norm)
    factors = np.asarray(rule(NORMS), np.float64)
    assert np.isfinite(factors).all() and (factors >= 0).all()
    scaled_norms = factors * NORMS
    assert scaled_norms.max() <= rule.sensitivity * (1 + 1e-6)
    # The bound is tight, so the noise is not larger than necessary.
    assert np.max(np.asarray(rule(np.float32([norm, 1e6 * norm]))) * [norm, 1e6 * norm]) > 0.99 * rule.sensitivity


@pytest.mark.parametrize("norm", [0.01, 0.5, 7.0])
def test_normalized_clip_is_flat_clip_over_clip_norm(norm):
    np.testing.assert_allclose(NormalizedClip(norm)(NORMS), FlatClip(norm)(NORMS) / norm, rtol=1e-6)
    assert NormalizedClip(norm).sensitivity == 1
    assert NormalizedClip(norm)(jnp.zeros(1)) == pytest.approx(1 / norm)


def test_normalized_clipped_sum_is_flat_sum_over_clip_norm():
    params, units = jnp.zeros(4), np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
    losses = per_example(lambda params, unit: params @ unit)
    assert 0 < np.sum(np.linalg.norm(units, axis=1) > 1.5) < 8
    normalized, flat = (clipped_sum(losses, params, units, clip=rule(1.5))[0] for rule in (NormalizedClip, FlatClip))
    np.testing.assert_allclose(normalized, flat / 1.5, rtol=1e-5)


@pytest.mark.parametrize("others", GROUP_NORMS)
@pytest.mark.parametrize("groups", [1, 3, 64])
@pytest.mark.parametrize("rule", [*RULES, UnitNorm])
def test_groupwise_norm_is_within_sensitivity(rule, groups, others):
    clip = Groupwise(rule(0.5), groups)
    norms = np.full(groups, 0.5 / np.sqrt(groups), np.float32)
    norms[1:] *= GROUP_NORMS[others]
    assert np.linalg.norm(clip.group_rule(norms) * norms) <= clip.sensitivity * (1 + 1e-5)
    # The bound is tight if all groups are clipped.
    if rule is not DropAbove:
        large = np.full(groups, 1e6, np.float32)
        assert np.linalg.norm(clip.group_rule(large) * large) == pytest.approx(clip.sensitivity, rel=1e-5)


@pytest.mark.parametrize("groups", [1, 3, 64])
def test_groupwise_preserves_sensitivity(groups):
    for rule in RULES:
        assert Groupwise(rule(0.3), groups).sensitivity == pytest.approx(rule(0.3).sensitivity)
    # A rule whose sensitivity ignores clip_norm has it once per group.
    assert Groupwise(UnitNorm(), groups).sensitivity == pytest.approx(np.sqrt(groups))


@pytest.mark.parametrize("groups", [1, 3, 64])
def test_normalized_group_rule_is_flat_group_rule_over_clip_norm(groups):
    normalized, flat = (Groupwise(rule(0.3), groups).group_rule(NORMS) for rule in (NormalizedClip, FlatClip))
    np.testing.assert_allclose(normalized, flat / 0.3, rtol=1e-6)


def test_normalized_groupwise_clipping_of_a_decoder(decoder, make_batch, unit_losses, relative_error):
    """With a tied table, whose two uses share a group; also checks the sensitivity to one unit."""
    model, params = decoder("tied")
    batch, losses, groups = make_batch("pair"), unit_losses(model, "pair"), count_groups(params)

    @functools.partial(jax.jit, static_argnums=0)
    def total(rule, mask):
        return clipped_sum(losses, params, batch, clip=Groupwise(rule, groups), mask=mask, method="group")[0]

    all_units = np.ones(len(batch.tokens), bool)
    normalized, flat = total(NormalizedClip(0.7), all_units), total(FlatClip(0.7), all_units)
    assert relative_error(normalized, optax.tree.scale(1 / 0.7, flat)) < 1e-5
    single_unit = total(NormalizedClip(0.7), np.arange(len(batch.tokens)) == 1)
    assert 0.5 < optax.tree.norm(single_unit) <= 1 + 1e-4


def test_auto_s_keeps_small_gradients_small_and_ignores_the_scale_of_large_ones():
    rule = AutoS(1.0)
    scaled_norms = np.asarray(rule(NORMS), np.float64) * NORMS
    np.testing.assert_allclose(scaled_norms, NORMS / (NORMS + np.float64(rule.numerical_stability)), rtol=1e-5)
    norms = np.float32([1.0, 5.0, 30.0])
    np.testing.assert_allclose(rule(1e4 * norms) * 1e4, rule(norms), rtol=2 * rule.numerical_stability)


def test_every_rule_has_an_option():
    assert set(_RULES) == set(typing.get_args(typing.get_type_hints(Privacy)["clip"]))
    assert set(_RULES.values()) == set(RULES)


@pytest.mark.parametrize("groupwise", [False, True])
def test_normalized_option(groupwise):
    options = Privacy(noise_multiplier=1.5, delta=1e-5, clip="normalized", clip_norm=0.2, groupwise=groupwise)
    trainable = {"layers": {"kernel": np.zeros((3, 2, 2))}, "norm": np.zeros(2)}
    mechanism = options.mechanism(
        trainable, dataset_size=100, expected_batch=10, steps=5, multiple=1, example="trajectory"
    )
    assert mechanism.clip == (Groupwise(NormalizedClip(0.2), 4) if groupwise else NormalizedClip(0.2))
    assert mechanism.noise_stddev == pytest.approx(1.5)


@pytest.mark.parametrize("fields", [{"clip_norm": 0.0}, {"max_norm": 0.0}, {"max_norm": np.inf}])
def test_invalid_norms_are_rejected(fields):
    with pytest.raises(ValueError, match=f"{next(iter(fields))} must be positive and finite"):
        NormalizedClip(**fields)
