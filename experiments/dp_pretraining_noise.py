"""Calibrated noise multiplier by batch size, for a fixed number of units processed in total."""

from __future__ import annotations

from typing import NamedTuple

from shiq_jax.privacy import Mechanism


class AccountingRun(NamedTuple):
    """Data sizes of a run: private units, epochs over them, delta, and the batch sizes to compare."""

    units: int
    passes: float
    delta: float
    batches: tuple[int, ...]


# Sizes of a large pretraining run, for comparison with the small experiment.
LARGE_RUN = AccountingRun(1_000_000, 3, 1e-7, tuple(2**power for power in range(8, 17)))


def noise_multiplier(run: AccountingRun, epsilon: float, batch: int) -> float:
    """The smallest noise multiplier with which the whole run satisfies epsilon and delta."""
    steps = round(run.units * run.passes / batch)
    return Mechanism.calibrated(
        epsilon=epsilon, delta=run.delta, dataset_size=run.units, expected_batch=batch, steps=steps
    ).noise_multiplier


def curve(run: AccountingRun, epsilons: tuple[float, ...]) -> dict:
    """Noise multipliers by epsilon and batch size, as JSON values."""
    sigma = {f"{epsilon:g}": {str(b): noise_multiplier(run, epsilon, b) for b in run.batches} for epsilon in epsilons}
    return {"units": run.units, "passes": run.passes, "delta": run.delta, "sigma": sigma}
