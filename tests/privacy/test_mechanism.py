"""What a mechanism costs against published numbers, and that it does what it is accounted for."""

import dataclasses

import numpy as np
import pytest
from scipy import stats

from shiq_jax.errors import UserError
from shiq_jax.privacy import AutoS, FlatClip, Groupwise, Mechanism, NormalizedClip, mechanism
from shiq_jax.privacy.mechanism import largest_batch

MNIST = Mechanism(
    dataset_size=60_000, expected_batch=256, steps=14_062, noise_multiplier=1.1, delta=1e-5, largest_batch=400
)
KEY = bytes(range(32))


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
def test_epsilons_of_poisson_sampling(batch, sigma, steps, epsilon):
    """Of privacy loss distributions, delta 1e-5: the rows of tensorflow/privacy's tutorials and others."""
    # Eight standard deviations above the mean nothing is cut to speak of.
    largest = int(batch + 8 * batch**0.5)
    found = dataclasses.replace(
        MNIST, expected_batch=batch, noise_multiplier=sigma, steps=steps, largest_batch=largest
    ).epsilon()
    np.testing.assert_allclose(found, epsilon, atol=max(2e-3, 1e-3 * epsilon))


@pytest.mark.parametrize(("sigma", "steps"), [(1.0, 1), (10.0, 100)])
def test_the_gaussian_mechanism_has_its_closed_form(sigma, steps):
    every = dataclasses.replace(
        MNIST, dataset_size=100, expected_batch=100, largest_batch=100, noise_multiplier=sigma, steps=steps
    )
    np.testing.assert_allclose(every.epsilon(), 4.37718, atol=1e-3)


@pytest.mark.parametrize(("places", "epsilon"), [(256, 12.63), (320, 2.409), (352, 2.3817)])
def test_truncation_costs(places, epsilon):
    found = dataclasses.replace(MNIST, largest_batch=places).epsilon()
    np.testing.assert_allclose(found, epsilon, rtol=2e-3)
    assert largest_batch(60_000, 256) == 352


def test_replacing_a_unit_costs_more_than_leaving_it_out():
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
    """Within half a percent, be it many times the sensitivity or a tenth of it."""
    numbers = dict(zip(("dataset_size", "expected_batch", "steps"), numbers))
    found = Mechanism.calibrated(epsilon=epsilon, delta=1e-5, **numbers)
    assert found.epsilon() <= epsilon
    assert dataclasses.replace(found, noise_multiplier=0.995 * found.noise_multiplier).epsilon() > epsilon


@pytest.mark.slow
@pytest.mark.parametrize(("epsilon", "sigma"), [(2, 1.224), (3, 0.968)])
def test_calibration(epsilon, sigma):
    found = Mechanism.calibrated(epsilon=epsilon, delta=1e-5, dataset_size=60_000, expected_batch=256, steps=14_062)
    np.testing.assert_allclose(found.noise_multiplier, sigma, rtol=5e-3)
    assert found.epsilon() <= epsilon
    assert dataclasses.replace(found, noise_multiplier=0.995 * found.noise_multiplier).epsilon() > epsilon
    assert found.largest_batch == 352


@pytest.mark.slow
def test_epsilon_grows_with_steps_and_sampling_and_falls_with_noise():
    small = dataclasses.replace(MNIST, dataset_size=1000, expected_batch=50, largest_batch=100, steps=10)
    costs = [small.epsilon(steps) for steps in (0, 1, 10)]
    assert costs[0] == 0 and costs == sorted(set(costs))
    assert dataclasses.replace(small, expected_batch=80).epsilon() > small.epsilon()
    assert dataclasses.replace(small, noise_multiplier=1.5).epsilon() < small.epsilon()
    assert dataclasses.replace(small, noise_multiplier=0.0).epsilon() == np.inf


CHANGES = {
    "dataset_size": 999, "expected_batch": 51.0, "steps": 99, "noise_multiplier": 1.2, "largest_batch": 101,
}  # fmt: skip


@pytest.mark.parametrize("field", CHANGES)
def test_every_number_of_the_run_is_accounted_for(field):
    small = dataclasses.replace(MNIST, dataset_size=1000, expected_batch=50.0, largest_batch=100, steps=100)
    other = dataclasses.replace(small, **{field: CHANGES[field]})
    assert repr(other.event()) != repr(small.event())


@pytest.mark.parametrize("field", ["delta", "adjacency"])
def test_what_is_no_part_of_the_event_is_part_of_epsilon(field):
    small = dataclasses.replace(MNIST, dataset_size=1000, expected_batch=50.0, largest_batch=100, steps=100)
    other = dataclasses.replace(small, **{field: {"delta": 1e-6, "adjacency": "replace_one"}[field]})
    assert other.epsilon() > small.epsilon()


def test_the_clip_rule_sets_the_noise():
    for clip, sensitivity in (
        (FlatClip(0.3), 0.3), (AutoS(2.0), 2.0), (Groupwise(FlatClip(0.5), 9), 0.5), (NormalizedClip(0.5), 1.0),
        (Groupwise(NormalizedClip(0.5), 9), 1.0),
    ):  # fmt: skip
        assert dataclasses.replace(MNIST, clip=clip).noise_stddev == pytest.approx(1.1 * sensitivity)


def test_every_unit_is_drawn_with_the_same_probability_and_alone():
    """Inclusion of each unit, of pairs of units, and the size, against their distributions."""
    units, batch, steps = 40, 10, 4000
    mechanism = Mechanism(
        dataset_size=units, expected_batch=batch, steps=steps, noise_multiplier=1.0, delta=1e-5, largest_batch=14
    )
    drawn = np.zeros((steps, units), bool)
    for step in range(steps):
        chosen, real = mechanism.sample(KEY, step)
        assert chosen.shape == real.shape == (14,)
        assert len(set(chosen[real])) == real.sum() and not chosen[~real].any()
        drawn[step, chosen[real]] = True
    sizes = drawn.sum(1)
    law = stats.binom(units, batch / units)
    expected = np.append(law.pmf(np.arange(14)), law.sf(13))
    counts = np.bincount(sizes, minlength=15)
    big = expected * steps > 5
    grouped = [np.append(each[big], each[~big].sum()) for each in (counts, expected * steps)]
    assert stats.chisquare(*grouped).pvalue > 1e-3
    # Cutting at 14 takes a little from the probability of each.
    q = np.sum(np.minimum(np.arange(units + 1), 14) * law.pmf(np.arange(units + 1))) / units
    deviations = (drawn.mean(0) - q) / np.sqrt(q * (1 - q) / steps)
    assert np.abs(deviations).max() < 4
    first, second = drawn[:, ::2], drawn[:, 1::2]
    together = (first & second).mean(0)
    assert np.abs(together - q * q).max() < 4 * np.sqrt(q * q / steps)


def test_a_sample_is_a_function_of_the_key_and_the_step():
    mechanism = dataclasses.replace(MNIST, dataset_size=1000, expected_batch=50, largest_batch=100)
    for one, other in zip(mechanism.sample(KEY, 7), mechanism.sample(KEY, 7)):
        np.testing.assert_array_equal(one, other)
    assert np.any(mechanism.sample(KEY, 7)[0] != mechanism.sample(KEY, 8)[0])
    assert np.any(mechanism.sample(KEY, 7)[0] != mechanism.sample(bytes(32), 7)[0])


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ({"delta": 1.0}, r"delta must lie in \(0, 1\)"),
        ({"expected_batch": 60_001}, "an expected batch of 60001 cannot be drawn from 60000 units"),
        ({"dataset_size": 0}, "dataset_size must be a whole number of at least 1, not 0"),
        ({"expected_batch": float("nan")}, "an expected batch of nan cannot be drawn from 60000 units"),
        ({"steps": 0}, "steps must be a whole number of at least 1, not 0"),
        ({"steps": 2.5}, "steps must be a whole number of at least 1, not 2.5"),
        ({"largest_batch": 0}, "largest_batch must be a whole number of at least 1, not 0"),
        ({"noise_multiplier": float("nan")}, "noise_multiplier must be finite"),
        ({"adjacency": "remove"}, "adjacency must be zero_out or replace_one or add_remove, not 'remove'"),
        ({"adjacency": "add_remove"}, "largest_batch must be at least the dataset_size 60000, not 400"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(wrong, complaint):
    with pytest.raises(UserError, match=complaint):
        dataclasses.replace(MNIST, **wrong)


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ({"dataset_size": 0}, "dataset_size must be a whole number of at least 1, not 0"),
        ({"dataset_size": -3}, "dataset_size must be a whole number of at least 1, not -3"),
        ({"dataset_size": 99.5}, "dataset_size must be a whole number of at least 1, not 99.5"),
        ({"dataset_size": float("inf")}, "dataset_size must be a whole number of at least 1, not inf"),
        ({"expected_batch": -1}, "an expected batch of -1 cannot be drawn from 100 units"),
        ({"expected_batch": 0}, "an expected batch of 0 cannot be drawn from 100 units"),
        ({"expected_batch": 101}, "an expected batch of 101 cannot be drawn from 100 units"),
        ({"expected_batch": float("nan")}, "an expected batch of nan cannot be drawn from 100 units"),
        ({"multiple": 0}, "multiple must be a whole number of at least 1, not 0"),
        ({"steps": 0}, "steps must be a whole number of at least 1, not 0"),
        ({"delta": 0}, r"delta must lie in \(0, 1\), not 0"),
    ],
)
def test_they_are_refused_before_anything_is_computed_of_them(wrong, complaint):
    numbers = {"dataset_size": 100, "expected_batch": 10, "steps": 5, "delta": 1e-5, "multiple": 4} | wrong
    for make in (
        lambda: Mechanism.from_noise_multiplier(noise_multiplier=1.0, **numbers), lambda: Mechanism.calibrated(epsilon=1.0, **numbers),
    ):  # fmt: skip
        with pytest.raises(UserError, match=complaint):
            make()


@pytest.fixture
def asked(monkeypatch):
    """A list that grows by one for every accountant that is asked."""
    calls, real = [], mechanism._accountant

    def counted(*arguments):
        calls.append(arguments)
        return real(*arguments)

    monkeypatch.setattr(mechanism, "_accountant", counted)
    return calls


def test_an_epsilon_that_no_noise_gives_is_refused(asked):
    with pytest.raises(UserError, match=r"makes 1000 steps \(1e-09, 1e-30\)-private: ask for a larger epsilon"):
        Mechanism.calibrated(epsilon=1e-9, delta=1e-30, dataset_size=10, expected_batch=10, steps=1000)
    # At a first guess and at the most that is tried, by coarse steps and by fine ones.
    assert len(asked) == 4


def test_an_epsilon_that_next_to_no_noise_gives_is_refused(asked):
    with pytest.raises(
        UserError, match="a noise_multiplier of 0.05, cost less than the epsilon 100000.0: ask for a sm"
    ):
        Mechanism.calibrated(epsilon=1e5, delta=1e-5, dataset_size=10, expected_batch=10, steps=1)
    assert len(asked) == 3


@pytest.mark.parametrize("epsilon", [0, -1.0, float("nan"), float("inf")])
def test_an_epsilon_that_is_none_is_refused(epsilon):
    with pytest.raises(UserError, match=f"epsilon must be positive and finite, not {epsilon}"):
        Mechanism.calibrated(epsilon=epsilon, delta=1e-5, dataset_size=1000, expected_batch=10, steps=10)


def test_a_bug_is_not_taken_for_an_epsilon_that_no_noise_gives(monkeypatch):
    def broken(self, steps=None):
        raise KeyError("a bug")

    monkeypatch.setattr(Mechanism, "event", broken)
    with pytest.raises(KeyError, match="a bug"):
        Mechanism.calibrated(epsilon=1.0, delta=1e-5, dataset_size=1000, expected_batch=10, steps=10)
