"""Measured and predicted loss improvement of single steps by batch size."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from shiq_jax.privacy import (
    Improvement,
    Landscape,
    Mechanism,
    adam_preconditioner,
    adam_state,
    clipped_sum,
    improvement,
    privatize,
)
from shiq_jax.replay import full_rows

if TYPE_CHECKING:
    from experiments.dp_pretraining import Arm, Experiment

# Repetitions per batch size, about ROWS / batch; large batches vary less.
MIN_DRAWS, MAX_DRAWS, ROWS = 8, 64, 4096


def single_steps(
    experiment: Experiment, name: str, arm: Arm, rates: dict, fraction: float, parts: tuple[float, ...], b2: float
) -> dict[str, Any]:
    """Measure single preconditioned steps from an intermediate state of an arm, with the first seed.

    Units are public sequences and the loss is that of held-out public sequences.

    Args:
        experiment: data, model and compiled functions.
        name: name of the arm.
        arm: the arm.
        rates: learning rates of the arm.
        fraction: fraction of the arm's steps before the state.
        parts: batch sizes relative to that of the experiment.
        b2: decay rate of Adam's second moment.
    """
    start, scale, plan = time.monotonic(), experiment.scale, experiment.plan(arm)
    seed, step = scale.seeds[0], round(fraction * plan.steps)
    state = next(state for number, state in experiment.states(name, arm, plan, seed, rates) if number == step)
    prediction = experiment.monitor_step(state, plan.mechanism, seed, units=scale.batch, probes=2 * scale.probes)
    curvature, trace = prediction["curvature"], prediction["trace"]
    result: dict[str, Any] = {"step": step, "curvature": curvature, "trace": trace, "rows": []}
    if min(curvature, trace) <= 0:
        # The quadratic model has no optimal step.
        return result
    public, batches = experiment.text.public, tuple(max(round(part * scale.batch), 1) for part in parts)
    result["rows"] = measure_steps(
        experiment.losses,
        lambda params: experiment.loss(params, experiment.text.public_held_out),
        state.trainable,
        adam_preconditioner(adam_state(state.opt_state), b2),
        lambda rng, count: full_rows(public[rng.integers(0, len(public), count)]),
        prediction,
        plan.mechanism,
        batches,
        seed,
    )
    return result | {"said": prediction, "seconds": round(time.monotonic() - start, 1)}


def measure_steps(
    losses: Callable,
    loss: Callable[[Any], float],
    params: Any,
    scale: Any,
    draw: Callable[[np.random.Generator, int], Any],
    prediction: Mapping[str, float],
    mechanism: Mechanism,
    batches: tuple[int, ...],
    seed: int,
) -> list[dict[str, Any]]:
    """Measure the improvement of steps with and without noise, each with its predicted optimal learning rate.

    Args:
        losses: per-unit losses, see `clipped_sum`.
        loss: evaluation loss as a function of parameters.
        params: parameters before the step.
        scale: diagonal preconditioner, a pytree like `params`.
        draw: returns random units.
        prediction: metrics of `improvement_metrics` with this preconditioner.
        mechanism: mechanism with the noise and the clip rule.
        batches: batch sizes.
        seed: random seed of units and noise.

    Returns:
        One row per batch size with `predicted` and `measured` improvement and its standard `error`, for "private" and
        "plain" steps.
    """
    landscape, rows = Landscape(*(prediction[name] for name in Landscape._fields)), []
    initial_loss, rng = loss(params), np.random.default_rng(seed)

    @jax.jit
    def step(units, key, rates):
        total = clipped_sum(losses, params, units, clip=mechanism.clip, method="scan")[0]
        with_noise = dataclasses.replace(mechanism, expected_batch=len(jax.tree.leaves(units)[0]))
        without_noise = dataclasses.replace(with_noise, noise_multiplier=0.0)
        gradients = (privatize(total, variant, key, 0) for variant in (with_noise, without_noise))
        return [
            jax.tree.map(lambda leaf, p, g, rate=rate: leaf - rate * p * g, params, scale, gradient)
            for gradient, rate in zip(gradients, rates, strict=True)
        ]

    for number, batch in enumerate(batches):
        predicted: list[Improvement] = [
            improvement(landscape, batch, noise, prediction["clipped"]) for noise in (mechanism.noise_stddev, 0.0)
        ]
        rates = [float(gain.learning_rate) / prediction["clipped"] for gain in predicted]
        draws, measured = int(np.clip(ROWS // batch, MIN_DRAWS, MAX_DRAWS)), []
        for key in jax.random.split(jax.random.fold_in(jax.random.key(seed), number), draws):
            measured.append([initial_loss - loss(stepped) for stepped in step(draw(rng, batch), key, rates)])
        mean, error = np.mean(measured, axis=0), np.std(measured, axis=0, ddof=1) / draws**0.5
        row = {"batch": batch, "draws": draws, "slowdown": float(predicted[0].slowdown)}
        columns = (predicted, rates, mean.tolist(), error.tolist())
        for kind, gain, *values in zip(("private", "plain"), *columns, strict=True):
            row[kind] = dict(zip(("rate", "measured", "error"), values)) | {"predicted": float(gain.private)}
        rows.append(row)
    return rows
