"""Bootstrap intervals for constant, paired and random values."""

import numpy as np
import pytest

from experiments.bootstrap import interval


def test_constant_values_have_a_zero_width_interval():
    assert interval(np.full((3, 50), 0.25)) == pytest.approx((0.25, 0.25, 0.25))


def test_pairing_removes_shared_variation():
    rng = np.random.default_rng(0)
    shared = rng.normal(size=(3, 200)) * 10
    low, high = interval(shared + 1 - shared)[1:]
    assert low == pytest.approx(1) and high == pytest.approx(1)


def test_one_seed_matches_the_normal_interval():
    values = np.random.default_rng(1).normal(size=(1, 400))
    result = interval(values)
    error = values.std() / 20
    assert result.mean == pytest.approx(values.mean())
    assert result.low == pytest.approx(values.mean() - 1.96 * error, abs=0.15 * error)
    assert result.high == pytest.approx(values.mean() + 1.96 * error, abs=0.15 * error)


def test_variation_between_seeds_widens_the_interval():
    rng = np.random.default_rng(2)
    noise = rng.normal(size=(3, 300))
    different = noise + np.array([[-1.0], [0.0], [1.0]])
    equal = noise - noise.mean(axis=1, keepdims=True)
    assert np.diff(interval(different)[1:]) > 5 * np.diff(interval(equal)[1:])


def test_variances_of_seeds_and_questions_add():
    rng = np.random.default_rng(3)
    seed_effects, question_effects = rng.normal(size=(20, 1)), rng.normal(size=(1, 500)) * 3
    result = interval(seed_effects + question_effects)
    error = np.sqrt(seed_effects.var() / 20 + question_effects.var() / 500)
    assert result.high - result.low == pytest.approx(2 * 1.96 * error, rel=0.05)
