"""Noise of private training by sampling probability, for a fixed number of per-unit gradients."""

from __future__ import annotations

import math
from typing import Any

from shiq_jax.privacy import Mechanism

SAMPLING_PROBABILITIES = (1.0, 0.5, 0.25, 0.125)


def plan(units: int, gradients: int, sampling_probability: float, epsilon: float, delta: float) -> dict[str, Any]:
    """Calibrate one plan with `gradients` expected per-unit gradients in total and the given sampling probability.

    Returns:
        JSON values of the plan. `noise` is the standard deviation per coordinate of the noise in the average gradient
        over all steps, with clip norm 1.
    """
    batch = sampling_probability * units
    steps = round(gradients / batch)
    mechanism = Mechanism.calibrated(
        epsilon=epsilon, delta=delta, dataset_size=units, expected_batch=batch, steps=steps, unit="user"
    )
    return {
        "epsilon": epsilon,
        "share": sampling_probability,
        "steps": steps,
        "places": mechanism.largest_batch,
        "noise_multiplier": mechanism.noise_multiplier,
        "noise": mechanism.noise_stddev / batch / math.sqrt(steps),
        "computed": mechanism.largest_batch * steps,
    }


def plans(units: int, steps: int, epsilons: tuple[float, ...], delta: float) -> list[dict[str, Any]]:
    """All combinations of epsilon and sampling probability, with the gradient count of `steps` full batches."""
    return [
        plan(units, units * steps, sampling_probability, epsilon, delta)
        for epsilon in epsilons
        for sampling_probability in SAMPLING_PROBABILITIES
    ]
