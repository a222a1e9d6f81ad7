"""What a mechanism costs against published numbers, and that it does what it is accounted for."""

import dataclasses

import numpy as np
import pytest
from scipy import stats

from shiq_jax.errors import Refusal
from shiq_jax.privacy import Abadi, AutoS, Groupwise, Mechanism
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


@pytest.mark.parametrize(("epsilon", "sigma"), [(2, 1.224), (3, 0.968)])
def test_calibration(epsilon, sigma):
    found = Mechanism.calibrated(epsilon=epsilon, delta=1e-5, dataset_size=60_000, expected_batch=256, steps=14_062)
    np.testing.assert_allclose(found.noise_multiplier, sigma, rtol=5e-3)
    assert 0.99 * epsilon < found.epsilon() <= epsilon
    assert found.largest_batch == 352


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
    for clip, sensitivity in ((Abadi(0.3), 0.3), (AutoS(2.0), 2.0), (Groupwise(Abadi(0.5), 9), 0.5)):
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
        ({"steps": 0}, "steps 0"),
        ({"noise_multiplier": float("nan")}, "noise_multiplier must be finite"),
        ({"adjacency": "add_remove"}, "adjacency must be zero_out or replace_one"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(wrong, complaint):
    with pytest.raises(Refusal, match=complaint):
        dataclasses.replace(MNIST, **wrong)


def test_an_epsilon_that_no_noise_gives_is_refused():
    with pytest.raises(Refusal, match="no noise was found that makes 1000 steps"):
        Mechanism.calibrated(epsilon=1e-9, delta=1e-30, dataset_size=10, expected_batch=10, steps=1000)
