"""What `experiments.dp_pretraining` measures besides its arms, as sections of its page and as figures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from experiments.dp_pretraining_membership import Attack

FOUND = {"here": "the experiment's own data", "large": "a large run"}


def ratio(reading: Mapping[str, Any], epsilon: str) -> tuple[np.ndarray, np.ndarray]:
    """Batches, and sigma^2 / B."""
    sigma = reading["sigma"][epsilon]
    batches = np.array([int(batch) for batch in sigma])
    return batches, np.array(list(sigma.values())) ** 2 / batches


def noise(found: Mapping[str, Any]) -> str:
    """How noise goes with the batch."""
    if "noise" not in found:
        return ""
    said = []
    for name, reading in found["noise"].items():
        falls = []
        for epsilon in reading["sigma"]:
            batches, ratios = ratio(reading, epsilon)
            falls.append(f"by {ratios[0] / ratios[-1]:.3g} at epsilon {epsilon}")
        said.append(
            f"- {FOUND[name].capitalize()} ({reading['units']:,} units, {reading['passes']:.3g} passes, delta "
            f"{reading['delta']:g}): from a batch of {batches[0]:,} to one of {batches[-1]:,} sigma^2 / B falls "
            f"{' and '.join(falls)}, where 1 / B falls by {batches[-1] / batches[0]:,.0f}."
        )
    return f"""
## Noise by batch

By the accountant alone. All steps together read as many units, so that larger batches are fewer steps; sigma grows with
the batch, but slowly, so that sigma^2 / B falls, if less than the line 1 / B of a constant sigma.

![sigma^2 / B by batch](dp_pretraining_noise.png)

{chr(10).join(said)}
"""


def rules(found: Mapping[str, Any]) -> str:
    """What the clip rule does to the end of a fully private run."""
    if not found.get("rules"):
        return ""
    base = found["arms"]["fully private, epsilon 8"]
    ends = {seed: run["losses"][-1][1] for seed, run in base.items()}
    seed = next(iter(ends))
    lines = ["| rule | held-out loss, nats per byte | against AutoS |", "|---|---|---|"]
    lines.append(f"| AutoS, R = 1 | {ends[seed]:.3f} | |")
    for name, run in found["rules"].items():
        end = run["losses"][-1][1]
        lines.append(f"| {name} | {end:.3f} | {end - ends[seed]:+.3f} |")
    spread = max(ends.values()) - min(ends.values())
    differ = [name for name, run in found["rules"].items() if abs(run["losses"][-1][1] - ends[seed]) > spread]
    told = f"More than that from AutoS: {'; '.join(differ)}." if differ else "None is further than that from AutoS."
    return f"""
## Clip rules

Fully private at epsilon 8, the first seed alone, at the learning rate that was chosen with AutoS. The noise is sigma R,
and Adam does not see the scale of what it is given: R counts where gradients are shorter, or are dropped by Global for
being longer. A uniform guess has {np.log(256):.3f}.

{chr(10).join(lines)}

The three seeds of AutoS lie within {spread:.3f}. {told}
"""


def attacks(found: Mapping[str, Any]) -> str:
    """Whether members can be told."""
    if not found.get("attacks"):
        return ""
    lines = [
        "| model | private units | steps | loss of members | of others | AUC of the loss | of the difference "
        "| files held out |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, values in found["attacks"].items():
        units = "none" if name == "only public" else f"{values['units']:,}"
        here, there, _ = values["mean_losses"]
        ways = [Attack(**values[way]) for way in ("loss", "difference", "held_out")]
        cells = [f"{way.auc:.3f} ± {way.error:.3f}" for way in ways]
        cells[1] = "" if name == "only public" else cells[1]
        lines.append(f"| {name} | {units} | {values['steps']} | {here:.3f} | {there:.3f} | {' | '.join(cells)} |")
    told = [
        name
        for name, values in found["attacks"].items()
        if any(Attack(**values[way]).decided for way in ("loss", "difference"))
    ]
    said = f"Above chance by more than two errors, in one of the two: {'; '.join(told) or 'none'}."
    shift = found["attacks"]["only public"]["held_out"]["auc"]
    read = f"{found['settings']['batch'] * found['settings']['steps']:,}"
    return f"""
## Membership inference

Whatever has a low loss is called a member; 0.5 is chance, errors are those of Hanley and McNeil, first seed. Members
are private sequences that were drawn at least once, others are private ones of the same files that were not. The
difference is that to the loss of the model without private data, which makes up for texts that are hard or easy for
everyone. Against files that are held out, the last column, that model alone has {shift:.3f}: it tells files, so the
column says little where it is near that. The plain model reads {read} private sequences once each; "few units" are a
sample of them that is read again and again.

{chr(10).join(lines)}

{said}
"""


def steps(found: Mapping[str, Any]) -> str:
    """What single steps gain, and what the formula said."""
    points = stepped(found)
    if not points:
        return ""
    lines = [
        "| state | B | draws | predicted, with noise | measured | predicted, without | measured | slow-down |",
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
## Single steps by batch

One step from a state on the way, with the noise multiplier of the arm and the learning rate that the analysis calls
best for this batch, along the gradient in the metric of Adam; units are public, and so is the held-out loss. Means over
draws of units and noise, nats per byte and per unit of the batch.

![Improvement per unit](dp_pretraining_steps.png)

{chr(10).join(lines)}

{chr(10).join(f"- {sentence}" for sentence in agreement(found))}
"""


def stepped(found: Mapping[str, Any]) -> dict[str, Any]:
    """The points at which the analysis knows of a best step."""
    return {name: point for name, point in found.get("single_steps", {}).items() if point["rows"]}


def agreement(found: Mapping[str, Any]) -> list[str]:
    """How far measured steps are from predicted ones, in sentences."""
    said = [
        f"{name}, step {point['step']}: the curvature along the gradient, or the trace, is below 0, and the analysis knows "
        "of no best step; none was measured."
        for name, point in found["single_steps"].items()
        if not point["rows"]
    ]
    for name, point in stepped(found).items():
        parts = []
        for kind, word in (("private", "with noise"), ("plain", "without")):
            each = [row[kind]["measured"] / row[kind]["predicted"] for row in point["rows"]]
            parts.append(f"{min(each):.2f} to {max(each):.2f} times what was predicted {word}")
        best = max(point["rows"], key=lambda row: row["private"]["measured"] / row["batch"])
        said.append(
            f"{name}, step {point['step']}: steps gain {' and '.join(parts)}; per unit a batch of {best['batch']} "
            f"gains most of those tried, and {point['said']['best_batch']:.2g} is what the analysis says."
        )
    return said


def draw_noise(found: Mapping[str, Any], path: Path) -> None:
    """sigma^2 / B, and lines 1 / B through the first."""
    plt = _pyplot()
    figure, axes = plt.subplots(1, len(found["noise"]), figsize=(4.5 * len(found["noise"]), 3.6), squeeze=False)
    for axis, (name, reading) in zip(axes[0], found["noise"].items(), strict=True):
        for number, epsilon in enumerate(reading["sigma"]):
            batches, ratios = ratio(reading, epsilon)
            axis.plot(batches, ratios, "o-", color=f"C{number}", markersize=3, label=f"epsilon {epsilon}")
            line = ratios[0] * batches[0] / batches
            axis.plot(batches, line, ":", color=f"C{number}", linewidth=1, label="1 / B" if not number else None)
        axis.set(xscale="log", yscale="log", title=FOUND[name], xlabel="batch B", ylabel="sigma$^2$ / B")
        axis.set_xscale("log", base=2)
        axis.legend(frameon=False)
    _finish(figure, axes[0], path)


def draw_steps(found: Mapping[str, Any], path: Path) -> None:
    """Improvement per unit by batch: lines are predictions, points are means of measured steps."""
    plt = _pyplot()
    points = stepped(found)
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
        axis.set(xscale="log", yscale="log", title=f"{name}, step {point['step']}", xlabel="batch B")
        axis.set_xscale("log", base=2)
        axis.set_ylabel("improvement per unit, nats per byte")
        axis.legend(frameon=False, fontsize=8)
    _finish(figure, axes[0], path)


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def _finish(figure, axes, path: Path) -> None:
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    _pyplot().close(figure)
