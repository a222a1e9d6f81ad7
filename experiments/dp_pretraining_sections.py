"""Sections and figures of the `experiments.dp_pretraining` page, apart from the training arms."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from experiments.dp_pretraining_membership import Attack

RUN_NAMES = {"here": "this experiment", "large": "a large run"}
# Clip rules whose keys in the JSON results differ from their class names.
RULE_NAMES = {"Abadi": "FlatClip", "Global": "DropAbove"}


def variance_per_unit(run: Mapping[str, Any], epsilon: str) -> tuple[np.ndarray, np.ndarray]:
    """Batch sizes B, and sigma^2 / B."""
    sigma = run["sigma"][epsilon]
    batches = np.array([int(batch) for batch in sigma])
    return batches, np.array(list(sigma.values())) ** 2 / batches


def noise(results: Mapping[str, Any]) -> str:
    """Section on the noise multiplier by batch size."""
    if "noise" not in results:
        return ""
    lines = []
    for name, run in results["noise"].items():
        falls = []
        for epsilon in run["sigma"]:
            batches, values = variance_per_unit(run, epsilon)
            falls.append(f"by a factor of {values[0] / values[-1]:.3g} at epsilon {epsilon}")
        lines.append(
            f"- {RUN_NAMES[name].capitalize()} ({run['units']:,} units, {run['passes']:.3g} epochs, delta "
            f"{run['delta']:g}): from a batch of {batches[0]:,} to one of {batches[-1]:,} sigma^2 / B falls "
            f"{' and '.join(falls)}; 1 / B falls by a factor of {batches[-1] / batches[0]:,.0f}."
        )
    return f"""
## Noise multiplier by batch size

The number of units processed is fixed, so a larger batch means fewer steps. The calibrated noise multiplier sigma grows
slowly with the batch size B, so sigma^2 / B falls more slowly than 1 / B.

![sigma^2 / B by batch size](dp_pretraining_noise.png)

{chr(10).join(lines)}
"""


def rules(results: Mapping[str, Any]) -> str:
    """Section on the clip rules."""
    if not results.get("rules"):
        return ""
    baseline = results["arms"]["fully private, epsilon 8"]
    final_losses = {seed: run["losses"][-1][1] for seed, run in baseline.items()}
    first = final_losses[next(iter(final_losses))]
    spread = max(final_losses.values()) - min(final_losses.values())
    lines = ["| rule | held-out loss, nats per byte | difference from AutoS |", "|---|---|---|"]
    lines.append(f"| AutoS, R = 1 | {first:.3f} | |")
    outside = []
    for key, run in results["rules"].items():
        rule, _, clip_norm = key.partition(",")
        name, loss = f"{RULE_NAMES.get(rule, rule)},{clip_norm}", run["losses"][-1][1]
        lines.append(f"| {name} | {loss:.3f} | {loss - first:+.3f} |")
        if abs(loss - first) > spread:
            outside.append(name)
    conclusion = f"Larger differences: {'; '.join(outside)}." if outside else "No rule differs by more than that."
    return f"""
## Clip rules

{chr(10).join(lines)}

- All runs are fully private at epsilon 8, with the first seed and the learning rate chosen for AutoS.
- The noise scales with the clip norm R, and Adam is invariant to the scale of the gradient. R therefore matters only
  for gradients with norm below R, which FlatClip and DropAbove do not scale, and for gradients with norm above R,
  which DropAbove drops.
- The three seeds of AutoS lie within {spread:.3f}. {conclusion}
- A uniform prediction has loss {np.log(256):.3f}.
"""


def attacks(results: Mapping[str, Any]) -> str:
    """Section on membership inference."""
    if not results.get("attacks"):
        return ""
    lines = [
        "| model | private units | steps | loss of members | loss of non-members | AUC, loss | AUC, difference "
        "| AUC, held-out files |",
        "|---|---|---|---|---|---|---|---|",
    ]
    detected = []
    for name, values in results["attacks"].items():
        units = "none" if name == "only public" else f"{values['units']:,}"
        members, nonmembers, _ = values["mean_losses"]
        by_loss, by_difference, held_out = (Attack(**values[key]) for key in ("loss", "difference", "held_out"))
        cells = [f"{attack.auc:.3f} ± {attack.error:.3f}" for attack in (by_loss, by_difference, held_out)]
        cells[1] = "" if name == "only public" else cells[1]
        lines.append(
            f"| {name} | {units} | {values['steps']} | {members:.3f} | {nonmembers:.3f} | {' | '.join(cells)} |"
        )
        if by_loss.significant or by_difference.significant:
            detected.append(name)
    shift = results["attacks"]["only public"]["held_out"]["auc"]
    units_read = f"{results['settings']['batch'] * results['settings']['steps']:,}"
    return f"""
## Membership inference

{chr(10).join(lines)}

- More than two standard errors above chance by loss or difference: {"; ".join(detected) or "none"}.
- The attack classifies sequences with a low loss as members; 0.5 is chance. Errors follow Hanley and McNeil (1982).
- All models use the first seed.
- Members are private sequences that were in a batch; non-members are private sequences of the same files that were not.
- *Difference* subtracts the loss of the model without private data, which calibrates for the difficulty of a sequence.
- *Held-out files* compares members with held-out files. The model without private data has {shift:.3f} there, so values
  near it show a difference between the files, not membership.
- The non-private model trains once on {units_read} private sequences. The "few units" arms train on a sample for many
  epochs.
"""


def steps(results: Mapping[str, Any]) -> str:
    """Section on the measured and predicted improvement of single steps."""
    points = measured_points(results)
    if not points:
        return ""
    lines = [
        "| state | B | draws | predicted, with noise | measured, with noise | predicted, without | measured, without "
        "| slowdown |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, point in points.items():
        for row in point["rows"]:
            cells = [
                f"{row[kind]['predicted'] / row['batch']:.2e} | {row[kind]['measured'] / row['batch']:.2e} ± "
                f"{row[kind]['error'] / row['batch']:.0e}"
                for kind in ("private", "plain")
            ]
            lines.append(
                f"| {name}, step {point['step']} | {row['batch']} | {row['draws']} | {' | '.join(cells)} | "
                f"{row['slowdown']:.3g} |"
            )
    return f"""
## Single steps by batch size

Improvement of the held-out public loss by one preconditioned step, in nats per byte and per unit of the batch:

{chr(10).join(lines)}

![Improvement per unit](dp_pretraining_steps.png)

{chr(10).join(f"- {sentence}" for sentence in agreement(results))}
- Each step starts from an intermediate state of the arm and uses its noise multiplier, the preconditioner of Adam, and
  the predicted optimal learning rate for the batch size; units are public.
- Values are means over draws of units and noise.
"""


def measured_points(results: Mapping[str, Any]) -> dict[str, Any]:
    """States at which the quadratic model has an optimal step."""
    return {name: point for name, point in results.get("single_steps", {}).items() if point["rows"]}


def agreement(results: Mapping[str, Any]) -> list[str]:
    """Sentences that compare measured with predicted improvements."""
    sentences = [
        f"{name}, step {point['step']}: not measured, because the curvature along the gradient or the trace is "
        "negative and the quadratic model has no optimal step."
        for name, point in results["single_steps"].items()
        if not point["rows"]
    ]
    for name, point in measured_points(results).items():
        ranges = []
        for kind, condition in (("private", "with noise"), ("plain", "without")):
            ratios = [row[kind]["measured"] / row[kind]["predicted"] for row in point["rows"]]
            ranges.append(f"{min(ratios):.2f} to {max(ratios):.2f} times the prediction {condition}")
        best = max(point["rows"], key=lambda row: row["private"]["measured"] / row["batch"])
        sentences.append(
            f"{name}, step {point['step']}: the improvement is {' and '.join(ranges)}; the measured "
            f"improvement per unit is largest at batch size {best['batch']}, the predicted at "
            f"{point['said']['best_batch']:.2g}."
        )
    return sentences


def draw_noise(results: Mapping[str, Any], path: Path) -> None:
    """Plot sigma^2 / B, with a line proportional to 1 / B."""
    plt = _pyplot()
    figure, axes = plt.subplots(1, len(results["noise"]), figsize=(4.5 * len(results["noise"]), 3.6), squeeze=False)
    for axis, (name, run) in zip(axes[0], results["noise"].items(), strict=True):
        for number, epsilon in enumerate(run["sigma"]):
            batches, values = variance_per_unit(run, epsilon)
            axis.plot(batches, values, "o-", color=f"C{number}", markersize=3, label=f"epsilon {epsilon}")
            line = values[0] * batches[0] / batches
            axis.plot(batches, line, ":", color=f"C{number}", linewidth=1, label="1 / B" if not number else None)
        axis.set(xscale="log", yscale="log", title=RUN_NAMES[name], xlabel="batch size B", ylabel="sigma$^2$ / B")
        axis.set_xscale("log", base=2)
        axis.legend(frameon=False)
    _save(figure, axes[0], path)


def draw_steps(results: Mapping[str, Any], path: Path) -> None:
    """Plot the improvement per unit by batch size: predictions as lines, measurements as points."""
    plt = _pyplot()
    points = measured_points(results)
    figure, axes = plt.subplots(1, len(points), figsize=(4.8 * len(points), 3.8), squeeze=False)
    for axis, (name, point) in zip(axes[0], points.items(), strict=True):
        batches = np.array([row["batch"] for row in point["rows"]])
        for kind, label, color in (("private", "with noise", "tab:red"), ("plain", "without noise", "0.4")):
            predicted, measured, error = (
                np.array([row[kind][field] for row in point["rows"]]) / batches
                for field in ("predicted", "measured", "error")
            )
            axis.plot(batches, predicted, "--" if kind == "plain" else "-", color=color, label=f"predicted, {label}")
            axis.errorbar(batches, measured, 2 * error, fmt="o", color=color, markersize=4, label=f"measured, {label}")
        axis.set(xscale="log", yscale="log", title=f"{name}, step {point['step']}", xlabel="batch size B")
        axis.set_xscale("log", base=2)
        axis.set_ylabel("improvement per unit, nats per byte")
        axis.legend(frameon=False, fontsize=8)
    _save(figure, axes[0], path)


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def _save(figure, axes, path: Path) -> None:
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    _pyplot().close(figure)
