"""How much noise the accountant asks for, by the batch, where the units that are read in all stay the same."""

from __future__ import annotations

from typing import NamedTuple

from shiq_jax.privacy import Mechanism


class ImportContext(NamedTuple):
    """What a run reads: so many private units, so many times each, at a delta and with batches of these sizes."""

    units: int
    passes: float
    delta: float
    batches: tuple[int, ...]


# A run as large as pre-training is, beside which the experiment's own is small.
LARGE = ImportContext(1_000_000, 3, 1e-7, tuple(2**power for power in range(8, 17)))


def multiplier(reading: ImportContext, epsilon: float, batch: int) -> float:
    """sigma, the least noise multiplier with which all steps together are private."""
    steps = round(reading.units * reading.passes / batch)
    return Mechanism.calibrated(
        epsilon=epsilon, delta=reading.delta, dataset_size=reading.units, expected_batch=batch, steps=steps
    ).noise_multiplier


def curve(reading: ImportContext, epsilons: tuple[float, ...]) -> dict:
    """sigma by epsilon and by batch, and of what."""
    sigma = {f"{epsilon:g}": {str(b): multiplier(reading, epsilon, b) for b in reading.batches} for epsilon in epsilons}
    return {"units": reading.units, "passes": reading.passes, "delta": reading.delta, "sigma": sigma}
