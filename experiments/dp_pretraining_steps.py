"""Single steps from one state, by their batch: how much they lower a loss, and what the analysis said of that."""

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

# Fewer draws of large batches, which vary less.
FEWEST, MOST, ROWS = 8, 64, 4096


def single_steps(
    experiment: Experiment, name: str, arm: Arm, rates: dict, at: float, parts: tuple[float, ...], b2: float
) -> dict[str, Any]:
    """Steps from the state that an arm has after a part `at` of its steps, first seed, in the metric of Adam.

    The units are public, as are those that the analysis is told of, and the loss is that of held-out public ones.
    Batches are `parts` of the experiment's.
    """
    began, scale, plan = time.monotonic(), experiment.scale, experiment.plan(arm)
    seed, step = scale.seeds[0], round(at * plan.steps)
    state = next(state for number, state in experiment.states(name, arm, plan, seed, rates) if number == step)
    said = experiment.look(state, plan.mechanism, seed, units=scale.batch, probes=2 * scale.probes)
    found: dict[str, Any] = {"step": step, "curvature": said["curvature"], "trace": said["trace"], "rows": []}
    if min(said["curvature"], said["trace"]) <= 0:
        # The analysis knows of no best step here.
        return found
    known, batches = experiment.text.public, tuple(max(round(part * scale.batch), 1) for part in parts)
    found["rows"] = measured_steps(
        experiment.losses,
        lambda params: experiment.loss(params, experiment.text.public_held_out),
        state.trainable,
        adam_preconditioner(adam_state(state.opt_state), b2),
        lambda rng, count: full_rows(known[rng.integers(0, len(known), count)]),
        said,
        plan.mechanism,
        batches,
        seed,
    )
    return found | {"said": said, "seconds": round(time.monotonic() - began, 1)}


def measured_steps(
    losses: Callable,
    loss: Callable[[Any], float],
    params: Any,
    scale: Any,
    draw: Callable[[np.random.Generator, int], Any],
    said: Mapping[str, float],
    mechanism: Mechanism,
    batches: tuple[int, ...],
    seed: int,
) -> list[dict[str, Any]]:
    """What steps gain with noise and without, each with the learning rate that the analysis calls best for it.

    Args:
        losses: of units, see `clipped_sum`.
        loss: that is to fall, of parameters.
        params: to step from.
        scale: pytree like params, the diagonal that steps are multiplied by.
        draw: so many units, at random.
        said: what `improvement_metrics` found, with that diagonal.
        mechanism: of which noise and clip rule are taken.
        batches: numbers of units.
        seed: of units and noise.

    Returns:
        for each batch `predicted` and `measured`, the latter with its standard `error` over draws, by "private" and
        "plain".
    """
    found, rows = Landscape(*(said[name] for name in Landscape._fields)), []
    before, rng = loss(params), np.random.default_rng(seed)

    @jax.jit
    def stepped(units, key, rates):
        total = clipped_sum(losses, params, units, clip=mechanism.clip, method="scan")[0]
        of = dataclasses.replace(mechanism, expected_batch=len(jax.tree.leaves(units)[0]))
        silent = dataclasses.replace(of, noise_multiplier=0.0)
        gradients = (privatize(total, each, key, 0) for each in (of, silent))
        return [
            jax.tree.map(lambda leaf, p, g, rate=rate: leaf - rate * p * g, params, scale, gradient)
            for gradient, rate in zip(gradients, rates, strict=True)
        ]

    for number, batch in enumerate(batches):
        gains: list[Improvement] = [
            improvement(found, batch, noise, said["clipped"]) for noise in (mechanism.noise_stddev, 0.0)
        ]
        rates = [float(gain.learning_rate) / said["clipped"] for gain in gains]
        draws, fell = int(np.clip(ROWS // batch, FEWEST, MOST)), []
        for key in jax.random.split(jax.random.fold_in(jax.random.key(seed), number), draws):
            fell.append([before - loss(after) for after in stepped(draw(rng, batch), key, rates)])
        mean, error = np.mean(fell, axis=0), np.std(fell, axis=0, ddof=1) / draws**0.5
        row = {"batch": batch, "draws": draws, "slowdown": float(gains[0].slowdown)}
        for kind, gain, *numbers in zip(("private", "plain"), gains, rates, mean.tolist(), error.tolist(), strict=True):
            row[kind] = dict(zip(("rate", "measured", "error"), numbers)) | {"predicted": float(gain.private)}
        rows.append(row)
    return rows
