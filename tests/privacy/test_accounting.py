"""Epsilons of Poisson sampling by three ways of accounting for them, and in which direction every number moves them."""

import dataclasses
import math

import dp_accounting
import numpy as np
import pytest
from dp_accounting.rdp import RdpAccountant
from scipy import stats

from shiq_jax.privacy import Mechanism
from shiq_jax.privacy.mechanism import largest_batch

DELTA = 1e-5
# Of the published numbers, which are older than the better conversion and more orders.
CLASSICAL_ORDERS = [*np.arange(11, 110) / 10, *range(12, 64)]
# (units, batch, sigma, steps) -> classical, RDP and PLD. Classical: tensorflow/privacy's tutorials; q = 0.01: arXiv
# 1607.00133; q = 0.04: opacus' tests of its accountants, 7.32911 of other orders.
ROWS = {
    (60_000, 256, 1.1, 14_062): (3.008, 2.597, 2.382),
    (60_000, 256, 1.1, 3_515): (1.594, 1.281, 1.134),
    (60_000, 256, 1.3, 3_515): (1.192, 0.954, 0.864),
    (60_000, 256, 0.7, 10_546): (7.101, 6.319, 5.639),
    (60_000, 250, 1.3, 3_600): (1.180, 0.942, 0.853),
    (60_000, 250, 0.7, 10_800): (7.010, 6.234, 5.562),
    (60_000, 600, 4.0, 10_000): (1.259, 1.0355, 0.947),
    (60_000, 600, 1.0, 1_000): (None, 2.101, 1.828),
    (60_000, 2_400, 1.5, 2_250): (None, 7.3293, None),
    (60_000, 2_400, 1.5, 2_249): (None, 7.3275, None),
    (100, 100, 1.0, 1): (None, 4.7285, 4.37718),
    (100, 100, 10.0, 100): (None, 4.7285, 4.37718),
}  # fmt: skip


def untruncated(units, batch, sigma, steps, adjacency="add_remove") -> Mechanism:
    return Mechanism(
        dataset_size=units, expected_batch=batch, steps=steps, noise_multiplier=sigma, delta=DELTA, largest_batch=units,
        adjacency=adjacency,
    )  # fmt: skip


def renyi(mechanism, orders=None):
    """An accountant of Renyi divergences that was told of all steps."""
    return RdpAccountant(orders, dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE).compose(mechanism.event())


def tolerance(epsilon):
    return max(2e-3, 1e-3 * epsilon * (epsilon > 4))


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_published_epsilons(row):
    """And the better way of accounting never says more."""
    mechanism = untruncated(*row)
    classical, rdp, pld = ROWS[row]
    accountant = renyi(mechanism, CLASSICAL_ORDERS)
    by_classical = np.min(accountant.rdp + math.log(1 / DELTA) / (accountant.orders - 1))
    by_rdp, by_pld = renyi(mechanism).get_epsilon(DELTA), mechanism.epsilon()
    if classical is not None:
        np.testing.assert_allclose(by_classical, classical, rtol=0, atol=tolerance(classical))
    np.testing.assert_allclose(by_rdp, rdp, rtol=0, atol=tolerance(rdp))
    if pld is not None:
        np.testing.assert_allclose(by_pld, pld, rtol=0, atol=1e-4 if row[0] == row[1] else tolerance(pld))
    assert by_pld < by_rdp < by_classical


@pytest.mark.parametrize(("sigma", "steps"), [(0.5, 1), (3.0, 4), (10.0, 100)])
def test_the_gaussian_mechanism_has_its_closed_form(sigma, steps):
    """All units in all batches: delta of arXiv 1805.06530, theorem 8, with one step's noise over sqrt(steps)."""
    epsilon, mu = untruncated(100, 100, sigma, steps).epsilon(), math.sqrt(steps) / sigma
    delta = stats.norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * stats.norm.cdf(-mu / 2 - epsilon / mu)
    np.testing.assert_allclose(delta, DELTA, rtol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("adjacency", ["zero_out", "replace_one", "add_remove"])
@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("expected_batch", (10, 50, 1000)), ("steps", (1, 5, 20)), ("noise_multiplier", (1.0, 2.0, 4.0)),
        ("delta", (1e-4, 1e-5, 1e-7)),
    ],
)  # fmt: skip
def test_epsilon_grows_with_sampling_and_steps_and_falls_with_noise_and_delta(field, values, adjacency):
    """With the places of a batch that go with its size, where it may be cut."""
    costs = []
    for value in values:
        mechanism = dataclasses.replace(untruncated(1000, 50, 2.0, 5, adjacency), **{field: value})
        if adjacency != "add_remove":
            places = largest_batch(1000, mechanism.expected_batch)
            mechanism = dataclasses.replace(mechanism, largest_batch=places)
        costs.append(mechanism.epsilon())
    signs = np.sign(np.diff(costs))
    assert (signs == (-1 if field == "noise_multiplier" else 1)).all()


@pytest.mark.parametrize(("batch", "sigma", "steps"), [(1, 1.2, 200), (30, 2.0, 20), (100, 3.0, 20)])
def test_a_batch_that_holds_all_units_is_never_cut(batch, sigma, steps):
    """Then the truncated sampler is the Poisson sampler, in what it costs and in what it draws."""
    cut = untruncated(100, batch, sigma, steps, "zero_out")
    np.testing.assert_allclose(cut.epsilon(), untruncated(100, batch, sigma, steps).epsilon(), rtol=1e-6)
    assert dataclasses.replace(cut, largest_batch=128).epsilon() == cut.epsilon()
    replaced = dataclasses.replace(cut, adjacency="replace_one")
    poisson = dp_accounting.pld.PLDAccountant(dp_accounting.NeighboringRelation.REPLACE_ONE)
    poisson.compose(untruncated(100, batch, sigma, steps).event())
    np.testing.assert_allclose(replaced.epsilon(), poisson.get_epsilon(DELTA), rtol=1e-6)
    for step in range(5):
        drawn = [dataclasses.replace(cut, largest_batch=places).sample(bytes(32), step) for places in (100, 128)]
        np.testing.assert_array_equal(*(units[real] for units, real in drawn))


def test_epsilon_falls_to_that_of_poisson_sampling_with_the_places_of_a_batch():
    costs = [
        dataclasses.replace(untruncated(100, 30, 3.0, 5, "zero_out"), largest_batch=places).epsilon()
        for places in (30, 36, 45, 60, 100)
    ]
    assert costs == sorted(costs, reverse=True) and costs[0] > 1.2 * costs[-1]


def test_adding_or_removing_a_unit_is_the_untruncated_event():
    mechanism = untruncated(100, 30, 1.2, 7)
    one = dp_accounting.PoissonSampledDpEvent(0.3, dp_accounting.GaussianDpEvent(1.2))
    assert mechanism.event() == dp_accounting.SelfComposedDpEvent(one, 7)
    assert mechanism.event(3) == dp_accounting.SelfComposedDpEvent(one, 3)
    with pytest.raises(ValueError, match="largest_batch must be at least the dataset_size 100, not 99"):
        dataclasses.replace(mechanism, largest_batch=99)


def test_noise_is_calibrated_for_adding_or_removing_a_unit():
    found = Mechanism.calibrated(
        epsilon=2.0, delta=DELTA, dataset_size=20, expected_batch=10, steps=5, adjacency="add_remove"
    )
    assert found.largest_batch == 20
    assert 0.99 * 2 < found.epsilon() <= 2
