"""Epsilon of a mechanism against published numbers, calibration, and the distribution of its samples."""

import dataclasses

import chex
import numpy as np
import pytest
from scipy import stats

from shiq_jax.errors import UserError
from shiq_jax.privacy import AutoS, FlatClip, Groupwise, Mechanism, NormalizedClip
from shiq_jax.privacy.mechanism import _accountant, default_largest_batch

MNIST = Mechanism(
    dataset_size=60_000, expected_batch=256, steps=14_062, noise_multiplier=1.1, delta=1e-5, largest_batch=400
)
KEY = bytes(range(32))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("batch", "sigma", "steps", "epsilon"),
    [
        (256, 1.1, 14062, 2.382),
        (256, 1.1, 3515, 1.134),
        (256, 1.3, 3515, 0.864),
        (256, 0.7, 10546, 5.639),
        (250, 1.3, 3600, 0.853),
        (250, 0.7, 10800, 5.562),
        (600, 4.0, 10000, 0.947),
        (600, 1.0, 1000, 1.828),
    ],
)
def test_epsilon_of_poisson_sampling(batch, sigma, steps, epsilon):
    """Against published PLD numbers at delta 1e-5, some from the tutorials of tensorflow/privacy."""
    # With eight standard deviations of headroom truncation is negligible.
    mechanism = dataclasses.replace(
        MNIST, expected_batch=batch, noise_multiplier=sigma, steps=steps, largest_batch=int(batch + 8 * batch**0.5)
    )
    np.testing.assert_allclose(mechanism.epsilon(), epsilon, atol=max(2e-3, 1e-3 * epsilon))


@pytest.mark.parametrize(("sigma", "steps"), [(1.0, 1), (10.0, 100)])
def test_gaussian_mechanism_matches_closed_form(sigma, steps):
    full_batch = dataclasses.replace(
        MNIST, dataset_size=100, expected_batch=100, largest_batch=100, noise_multiplier=sigma, steps=steps
    )
    np.testing.assert_allclose(full_batch.epsilon(), 4.37718, atol=1e-3)


@pytest.mark.parametrize(("largest_batch", "epsilon"), [(256, 12.63), (320, 2.409), (352, 2.3817)])
def test_truncation_increases_epsilon(largest_batch, epsilon):
    mechanism = dataclasses.replace(MNIST, largest_batch=largest_batch)
    np.testing.assert_allclose(mechanism.epsilon(), epsilon, rtol=2e-3)


def test_default_largest_batch():
    assert default_largest_batch(60_000, 256) == 352


def test_epsilon_of_replace_one():
    np.testing.assert_allclose(dataclasses.replace(MNIST, adjacency="replace_one").epsilon(), 4.221, rtol=2e-3)


@pytest.mark.parametrize(
    ("epsilon", "numbers"),
    [
        (0.02, (1000, 30, 20)), pytest.param(1.0, (60_000, 256, 14_062), marks=pytest.mark.slow),
        pytest.param(8.0, (60_000, 256, 2000), marks=pytest.mark.slow),
        pytest.param(60.0, (10, 10, 1), marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_calibration_finds_the_least_noise(epsilon, numbers):
    """Within 0.5%, for noise multipliers from 0.1 to hundreds."""
    numbers = dict(zip(("dataset_size", "expected_batch", "steps"), numbers))
    mechanism = Mechanism.calibrated(epsilon=epsilon, delta=1e-5, **numbers)
    assert mechanism.epsilon() <= epsilon
    assert dataclasses.replace(mechanism, noise_multiplier=0.995 * mechanism.noise_multiplier).epsilon() > epsilon


@pytest.mark.slow
@pytest.mark.parametrize(("epsilon", "sigma"), [(2, 1.224), (3, 0.968)])
def test_calibration_matches_published_noise(epsilon, sigma):
    mechanism = Mechanism.calibrated(epsilon=epsilon, delta=1e-5, dataset_size=60_000, expected_batch=256, steps=14_062)
    np.testing.assert_allclose(mechanism.noise_multiplier, sigma, rtol=5e-3)
    assert mechanism.epsilon() <= epsilon
    assert dataclasses.replace(mechanism, noise_multiplier=0.995 * mechanism.noise_multiplier).epsilon() > epsilon
    assert mechanism.largest_batch == 352


@pytest.mark.slow
def test_epsilon_is_monotonic():
    small = dataclasses.replace(MNIST, dataset_size=1000, expected_batch=50, largest_batch=100, steps=10)
    epsilons = [small.epsilon(steps) for steps in (0, 1, 10)]
    assert epsilons[0] == 0 and epsilons == sorted(set(epsilons))
    assert dataclasses.replace(small, expected_batch=80).epsilon() > small.epsilon()
    assert dataclasses.replace(small, noise_multiplier=1.5).epsilon() < small.epsilon()
    assert dataclasses.replace(small, noise_multiplier=0.0).epsilon() == np.inf


CHANGED_FIELDS = {
    "dataset_size": 999, "expected_batch": 51.0, "steps": 99, "noise_multiplier": 1.2, "largest_batch": 101,
}  # fmt: skip


@pytest.mark.parametrize("field", CHANGED_FIELDS)
def test_event_depends_on_every_number(field):
    small = dataclasses.replace(MNIST, dataset_size=1000, expected_batch=50.0, largest_batch=100, steps=100)
    changed = dataclasses.replace(small, **{field: CHANGED_FIELDS[field]})
    assert repr(changed.event()) != repr(small.event())


@pytest.mark.parametrize("field", ["delta", "adjacency"])
def test_epsilon_depends_on_delta_and_adjacency(field):
    small = dataclasses.replace(MNIST, dataset_size=1000, expected_batch=50.0, largest_batch=100, steps=100)
    changed = dataclasses.replace(small, **{field: {"delta": 1e-6, "adjacency": "replace_one"}[field]})
    assert changed.epsilon() > small.epsilon()


def test_noise_scales_with_sensitivity():
    for clip, sensitivity in (
        (FlatClip(0.3), 0.3), (AutoS(2.0), 2.0), (Groupwise(FlatClip(0.5), 9), 0.5), (NormalizedClip(0.5), 1.0),
        (Groupwise(NormalizedClip(0.5), 9), 1.0),
    ):  # fmt: skip
        assert dataclasses.replace(MNIST, clip=clip).noise_stddev == pytest.approx(1.1 * sensitivity)


def test_samples_follow_poisson_sampling():
    """Batch sizes, inclusion of units and joint inclusion of pairs of units against their distributions."""
    units, batch, steps = 40, 10, 4000
    mechanism = Mechanism(
        dataset_size=units, expected_batch=batch, steps=steps, noise_multiplier=1.0, delta=1e-5, largest_batch=14
    )
    included = np.zeros((steps, units), bool)
    for step in range(steps):
        sampled, mask = mechanism.sample(KEY, step)
        assert sampled.shape == mask.shape == (14,)
        assert len(set(sampled[mask])) == mask.sum() and not sampled[~mask].any()
        included[step, sampled[mask]] = True
    sizes = included.sum(1)
    binomial = stats.binom(units, batch / units)
    expected = np.append(binomial.pmf(np.arange(14)), binomial.sf(13))
    counts = np.bincount(sizes, minlength=15)
    frequent = expected * steps > 5
    merged = [np.append(bins[frequent], bins[~frequent].sum()) for bins in (counts, expected * steps)]
    assert stats.chisquare(*merged).pvalue > 1e-3
    # Truncation at 14 lowers the inclusion probability a little.
    q = np.sum(np.minimum(np.arange(units + 1), 14) * binomial.pmf(np.arange(units + 1))) / units
    deviations = (included.mean(0) - q) / np.sqrt(q * (1 - q) / steps)
    assert np.abs(deviations).max() < 4
    first, second = included[:, ::2], included[:, 1::2]
    joint = (first & second).mean(0)
    assert np.abs(joint - q * q).max() < 4 * np.sqrt(q * q / steps)


def test_sample_is_a_function_of_key_and_step():
    mechanism = dataclasses.replace(MNIST, dataset_size=1000, expected_batch=50, largest_batch=100)
    chex.assert_trees_all_equal(mechanism.sample(KEY, 7), mechanism.sample(KEY, 7))
    assert np.any(mechanism.sample(KEY, 7)[0] != mechanism.sample(KEY, 8)[0])
    assert np.any(mechanism.sample(KEY, 7)[0] != mechanism.sample(bytes(32), 7)[0])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"delta": 1.0}, r"delta must lie in \(0, 1\)"),
        ({"expected_batch": 60_001}, r"expected_batch must lie in \(0, 60000\], the number of units, not 60001"),
        ({"dataset_size": 0}, "dataset_size must be a positive integer, not 0"),
        ({"expected_batch": float("nan")}, r"expected_batch must lie in \(0, 60000\], the number of units, not nan"),
        ({"steps": 0}, "steps must be a positive integer, not 0"),
        ({"steps": 2.5}, "steps must be a positive integer, not 2.5"),
        ({"largest_batch": 0}, "largest_batch must be a positive integer, not 0"),
        ({"noise_multiplier": float("nan")}, "noise_multiplier must be finite"),
        ({"adjacency": "remove"}, "adjacency must be zero_out or replace_one or add_remove, not 'remove'"),
        ({"adjacency": "add_remove"}, "largest_batch must be at least the dataset_size 60000, not 400"),
    ],
)
def test_invalid_fields_are_rejected(fields, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(MNIST, **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dataset_size": 0}, "dataset_size must be a positive integer, not 0"),
        ({"dataset_size": -3}, "dataset_size must be a positive integer, not -3"),
        ({"dataset_size": 99.5}, "dataset_size must be a positive integer, not 99.5"),
        ({"dataset_size": float("inf")}, "dataset_size must be a positive integer, not inf"),
        ({"expected_batch": -1}, r"expected_batch must lie in \(0, 100\], the number of units, not -1"),
        ({"expected_batch": 0}, r"expected_batch must lie in \(0, 100\], the number of units, not 0"),
        ({"expected_batch": 101}, r"expected_batch must lie in \(0, 100\], the number of units, not 101"),
        ({"expected_batch": float("nan")}, r"expected_batch must lie in \(0, 100\], the number of units, not nan"),
        ({"multiple": 0}, "multiple must be a positive integer, not 0"),
        ({"steps": 0}, "steps must be a positive integer, not 0"),
        ({"delta": 0}, r"delta must lie in \(0, 1\), not 0"),
    ],
)
def test_constructors_reject_invalid_numbers(fields, message):
    numbers = {"dataset_size": 100, "expected_batch": 10, "steps": 5, "delta": 1e-5, "multiple": 4} | fields
    with pytest.raises(UserError, match=message):
        Mechanism.from_noise_multiplier(noise_multiplier=1.0, **numbers)
    with pytest.raises(UserError, match=message):
        Mechanism.calibrated(epsilon=1.0, **numbers)


@pytest.fixture
def accountant_calls(monkeypatch):
    """The arguments of every accountant that is created."""
    calls = []

    def spy(*args):
        calls.append(args)
        return _accountant(*args)

    monkeypatch.setattr("shiq_jax.privacy.mechanism._accountant", spy)
    return calls


def test_unreachable_epsilon_is_rejected(accountant_calls):
    with pytest.raises(UserError, match=r"makes 1000 steps \(1e-09, 1e-30\)-private: choose a larger epsilon"):
        Mechanism.calibrated(epsilon=1e-9, delta=1e-30, dataset_size=10, expected_batch=10, steps=1000)
    # The initial noise and the upper bound, each on the coarse and on the fine grid.
    assert len(accountant_calls) == 4


def test_epsilon_that_needs_no_noise_is_rejected(accountant_calls):
    with pytest.raises(UserError, match="noise_multiplier of only 0.05 spend less than epsilon 100000.0: choose a"):
        Mechanism.calibrated(epsilon=1e5, delta=1e-5, dataset_size=10, expected_batch=10, steps=1)
    assert len(accountant_calls) == 3


@pytest.mark.parametrize("epsilon", [0, -1.0, float("nan"), float("inf")])
def test_invalid_epsilon_is_rejected(epsilon):
    with pytest.raises(UserError, match=f"epsilon must be positive and finite, not {epsilon}"):
        Mechanism.calibrated(epsilon=epsilon, delta=1e-5, dataset_size=1000, expected_batch=10, steps=10)


def test_calibration_does_not_swallow_exceptions(monkeypatch):
    def broken(self, steps=None):
        raise KeyError("a bug")

    monkeypatch.setattr(Mechanism, "event", broken)
    with pytest.raises(KeyError, match="a bug"):
        Mechanism.calibrated(epsilon=1.0, delta=1e-5, dataset_size=1000, expected_batch=10, steps=10)
