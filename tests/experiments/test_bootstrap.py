"""Intervals of the paired bootstrap: what they must be for constants, pairs, and numbers of known spread."""

import numpy as np
import pytest

from experiments.bootstrap import interval


def test_constants_have_no_spread():
    assert interval(np.full((3, 50), 0.25)) == pytest.approx((0.25, 0.25, 0.25))


def test_pairing_removes_what_both_share():
    rng = np.random.default_rng(0)
    shared = rng.normal(size=(3, 200)) * 10
    low, high = interval(shared + 1 - shared)[1:]
    assert low == pytest.approx(1) and high == pytest.approx(1)


def test_one_seed_is_the_ordinary_bootstrap_of_the_mean():
    values = np.random.default_rng(1).normal(size=(1, 400))
    found = interval(values)
    error = values.std() / 20
    assert found.mean == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - 1.96 * error, abs=0.15 * error)
    assert found.high == pytest.approx(values.mean() + 1.96 * error, abs=0.15 * error)


def test_seeds_that_differ_widen_it():
    rng = np.random.default_rng(2)
    noise = rng.normal(size=(3, 300))
    apart = noise + np.array([[-1.0], [0.0], [1.0]])
    together = noise - noise.mean(axis=1, keepdims=True)
    assert np.diff(interval(apart)[1:]) > 5 * np.diff(interval(together)[1:])


def test_questions_and_seeds_are_drawn_independently():
    """Of effects of both, the variance is that of either mean, added."""
    rng = np.random.default_rng(3)
    seeds, questions = rng.normal(size=(20, 1)), rng.normal(size=(1, 500)) * 3
    found = interval(seeds + questions)
    error = np.sqrt(seeds.var() / 20 + questions.var() / 500)
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.05)
