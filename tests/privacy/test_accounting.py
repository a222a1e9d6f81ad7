"""Epsilon of Poisson sampling against published numbers of three accountants, and its monotonicity."""

import dataclasses
import math

import dp_accounting
import numpy as np
import pytest
from dp_accounting.rdp import RdpAccountant
from scipy import stats

from shiq_jax.privacy import Mechanism
from shiq_jax.privacy.mechanism import default_largest_batch

DELTA = 1e-5
# Orders of the published numbers, which predate the tighter conversion and the finer grid of orders.
CLASSICAL_ORDERS = [*np.arange(11, 110) / 10, *range(12, 64)]
# (units, batch, sigma, steps) -> epsilon by classical RDP, RDP and PLD. Classical numbers are from the tutorials of
# tensorflow/privacy, q = 0.01 from arXiv 1607.00133, q = 0.04 from the tests of opacus (7.32911 with its orders).
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


def rdp_accountant(mechanism, orders=None):
    """A Renyi DP accountant with all steps composed."""
    return RdpAccountant(orders, dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE).compose(mechanism.event())


def tolerance(epsilon):
    return max(2e-3, 1e-3 * epsilon * (epsilon > 4))


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_published_epsilons(row):
    """The tighter accountant also gives the smaller epsilon."""
    mechanism = untruncated(*row)
    classical, rdp, pld = ROWS[row]
    accountant = rdp_accountant(mechanism, CLASSICAL_ORDERS)
    classical_epsilon = np.min(accountant.rdp + math.log(1 / DELTA) / (accountant.orders - 1))
    rdp_epsilon, pld_epsilon = rdp_accountant(mechanism).get_epsilon(DELTA), mechanism.epsilon()
    if classical is not None:
        np.testing.assert_allclose(classical_epsilon, classical, rtol=0, atol=tolerance(classical))
    np.testing.assert_allclose(rdp_epsilon, rdp, rtol=0, atol=tolerance(rdp))
    if pld is not None:
        np.testing.assert_allclose(pld_epsilon, pld, rtol=0, atol=1e-4 if row[0] == row[1] else tolerance(pld))
    assert pld_epsilon < rdp_epsilon < classical_epsilon


@pytest.mark.parametrize(("sigma", "steps"), [(0.5, 1), (3.0, 4), (10.0, 100)])
def test_gaussian_mechanism_matches_closed_form(sigma, steps):
    """Full batches: delta of arXiv 1805.06530, theorem 8, with the noise of one step over sqrt(steps)."""
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
def test_epsilon_is_monotonic(field, values, adjacency):
    """With the default largest batch, if the adjacency allows truncation."""
    epsilons = []
    for value in values:
        mechanism = dataclasses.replace(untruncated(1000, 50, 2.0, 5, adjacency), **{field: value})
        if adjacency != "add_remove":
            largest_batch = default_largest_batch(1000, mechanism.expected_batch)
            mechanism = dataclasses.replace(mechanism, largest_batch=largest_batch)
        epsilons.append(mechanism.epsilon())
    signs = np.sign(np.diff(epsilons))
    assert (signs == (-1 if field == "noise_multiplier" else 1)).all()


@pytest.mark.parametrize(("batch", "sigma", "steps"), [(1, 1.2, 200), (30, 2.0, 20), (100, 3.0, 20)])
def test_without_truncation_sampler_is_poisson(batch, sigma, steps):
    """Room for all units: epsilon and samples are those of the untruncated Poisson sampler."""
    mechanism = untruncated(100, batch, sigma, steps, "zero_out")
    np.testing.assert_allclose(mechanism.epsilon(), untruncated(100, batch, sigma, steps).epsilon(), rtol=1e-6)
    assert dataclasses.replace(mechanism, largest_batch=128).epsilon() == mechanism.epsilon()
    replaced = dataclasses.replace(mechanism, adjacency="replace_one")
    poisson = dp_accounting.pld.PLDAccountant(dp_accounting.NeighboringRelation.REPLACE_ONE)
    poisson.compose(untruncated(100, batch, sigma, steps).event())
    np.testing.assert_allclose(replaced.epsilon(), poisson.get_epsilon(DELTA), rtol=1e-6)
    for step in range(5):
        samples = [dataclasses.replace(mechanism, largest_batch=size).sample(bytes(32), step) for size in (100, 128)]
        np.testing.assert_array_equal(*(units[mask] for units, mask in samples))


def test_epsilon_decreases_with_largest_batch():
    epsilons = [
        dataclasses.replace(untruncated(100, 30, 3.0, 5, "zero_out"), largest_batch=size).epsilon()
        for size in (30, 36, 45, 60, 100)
    ]
    assert epsilons == sorted(epsilons, reverse=True) and epsilons[0] > 1.2 * epsilons[-1]


def test_add_remove_uses_poisson_event():
    mechanism = untruncated(100, 30, 1.2, 7)
    step_event = dp_accounting.PoissonSampledDpEvent(0.3, dp_accounting.GaussianDpEvent(1.2))
    assert mechanism.event() == dp_accounting.SelfComposedDpEvent(step_event, 7)
    assert mechanism.event(3) == dp_accounting.SelfComposedDpEvent(step_event, 3)
    with pytest.raises(ValueError, match="largest_batch must be at least the dataset_size 100, not 99"):
        dataclasses.replace(mechanism, largest_batch=99)


def test_calibration_for_add_remove():
    mechanism = Mechanism.calibrated(
        epsilon=2.0, delta=DELTA, dataset_size=20, expected_batch=10, steps=5, adjacency="add_remove"
    )
    assert mechanism.largest_batch == 20
    assert 0.99 * 2 < mechanism.epsilon() <= 2
