"""What a private plan costs: noise against signal, by the probability of sampling, for the same number of gradients."""

from __future__ import annotations

import math
from typing import Any

from shiq_jax.privacy import Mechanism

# Probabilities with which a unit is in a batch.
SHARES = (1.0, 0.5, 0.25, 0.125)


def plan(units: int, gradients: int, share: float, epsilon: float, delta: float) -> dict[str, Any]:
    """One plan: `gradients` unit gradients in expectation, in batches of `share` of the units.

    Returns:
        its numbers as JSON values; `noise` is the standard deviation, per coordinate, of the noise in the mean of all
        steps' gradients, when a unit's gradient has norm 1 at most: what a signal is to be compared with.
    """
    batch = share * units
    steps = round(gradients / batch)
    mechanism = Mechanism.calibrated(
        epsilon=epsilon, delta=delta, dataset_size=units, expected_batch=batch, steps=steps, unit="user"
    )
    return {
        "epsilon": epsilon,
        "share": share,
        "steps": steps,
        "places": mechanism.largest_batch,
        "noise_multiplier": mechanism.noise_multiplier,
        "noise": mechanism.noise_stddev / batch / math.sqrt(steps),
        "computed": mechanism.largest_batch * steps,
    }


def plans(units: int, steps: int, epsilons: tuple[float, ...], delta: float) -> list[dict[str, Any]]:
    """All plans with as many gradients as `steps` full batches."""
    return [plan(units, units * steps, share, epsilon, delta) for epsilon in epsilons for share in SHARES]
