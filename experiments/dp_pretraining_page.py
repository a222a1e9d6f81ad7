"""The page and the figures of `experiments.dp_pretraining`, out of its numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from experiments import dp_pretraining_sections as sections
from shiq_jax.runs import report

SHARES = ("fully private", "mixed 1%", "mixed 10%")
MONITORED = ("fully private, epsilon 8", "mixed 10%, epsilon 8")
# What nobody knows where too few probes give a trace below 0.
OF_THE_TRACE = ("decelerator", "slowdown", "best_batch")


def final(found: Mapping[str, Any], name: str) -> np.ndarray:
    """The last held-out losses of an arm, a number per seed."""
    return np.array([run["losses"][-1][1] for run in found["arms"].get(name, {}).values()])


def closed(found: Mapping[str, Any], name: str, epsilon: float) -> float:
    """Which part of the gap between fully private and fully public training an arm closes, in the mean over seeds."""
    worst, best = final(found, f"fully private, epsilon {epsilon:g}").mean(), final(found, "fully public").mean()
    return float((worst - final(found, name).mean()) / (worst - best))


def table(found: Mapping[str, Any]) -> str:
    """All arms as a Markdown table."""
    lines = ["| arm | held-out loss, nats per byte | seeds | switch | noise multiplier |", "|---|---|---|---|---|"]
    for name, runs in found["arms"].items():
        losses, run = final(found, name), next(iter(runs.values()), None)
        if run is None:
            continue
        noise = "" if run["noise_multiplier"] is None else f"{run['noise_multiplier']:.3f}"
        each = ", ".join(f"{loss:.3f}" for loss in losses)
        switch = run["switch"] if run["noise_multiplier"] else ""
        lines.append(f"| {name} | {losses.mean():.3f} | {each} | {switch} | {noise} |")
    return "\n".join(lines)


def early(found: Mapping[str, Any], name: str, step: int) -> float:
    """The mean over seeds of an arm's held-out losses at a step at which they were measured."""
    return float(np.mean([dict(map(tuple, run["losses"]))[step] for run in found["arms"][name].values()]))


def reasons(found: Mapping[str, Any]) -> str:
    """Why more public data do not mean less loss in the end, where they do not."""
    names = [f"{share}, epsilon 8" for share in SHARES]
    means = [final(found, name).mean() for name in names]
    if means[0] > means[1] > means[2]:
        return ""
    step = found["arms"][names[0]]["0"]["losses"][3][0]
    before = [f"{early(found, name, step):.3f}" for name in (names[0], names[2])]
    return f"""
## Why the paper's ordering may not be here

Public steps help for a while: at step {step} and epsilon 8 the loss is {before[0]} without them and {before[1]} with 10%;
at the end the arms have come equally far. What the recipe is for is noise, whose length grows with the square root of
the number of parameters, 10^8 in the paper. Here it is {noise_length(found, names[0]):.1f} long, beside a mean gradient of at most 1; that there is
little for public data to cure is a conjecture from this, and no arm here proves it. What clipping alone takes public
steps do not give back. The public share alone, read again and again, is worth more than private data at these epsilons:
both are source code of one language, and the model is small.
"""


def noise_length(found: Mapping[str, Any], name: str) -> float:
    """The expected length of the noise in the gradient of an arm's private step, the clip norm being 1."""
    run = next(iter(found["arms"][name].values()))
    return run["noise_multiplier"] / found["settings"]["batch"] * found["parameters"] ** 0.5


def verdicts(found: Mapping[str, Any]) -> list[str]:
    """What the numbers say of the paper's orderings, in sentences."""
    said = []
    for epsilon in (2.0, 8.0):
        names = [f"{share}, epsilon {epsilon:g}" for share in SHARES]
        losses = [final(found, name) for name in names]
        if not all(map(len, losses)):
            continue
        means = [each.mean() for each in losses]
        order = "do" if means[0] > means[1] > means[2] else "do not"
        parts = [f"{closed(found, name, epsilon):.0%}" for name in names[1:]]
        said.append(
            f"At epsilon {epsilon:g} more public data {order} mean less loss: {means[0]:.3f} without, {means[1]:.3f} "
            f"with 1% and {means[2]:.3f} with 10% of the steps; they close {parts[0]} and {parts[1]} of the gap to "
            "training on everything without privacy."
        )
        only = final(found, "only public")
        worse = sum(mixed < alone for mixed, alone in zip(losses[2], only))
        said.append(
            f"Against the public share alone ({only.mean():.3f}) private data gain something in {worse} of {len(only)} "
            f"seeds at epsilon {epsilon:g}, with 10%."
        )
    public, clipped, private = (
        final(found, name).mean() if len(final(found, name)) else np.nan
        for name in ("fully public", "clipped, no noise", "fully private, epsilon 8")
    )
    if np.isfinite(clipped):
        part = (clipped - public) / (private - public)
        said.append(
            f"Clipping without noise comes to {clipped:.3f}: of the {private - public:.3f} nats between public and "
            f"private training at epsilon 8 clipping takes {part:.0%} and noise {1 - part:.0%}, "
            "with the learning rate that was chosen for both."
        )
    seen = [values for name in MONITORED for _, values in monitor(found, name)]
    known = [values["slowdown"] for values in seen if values["trace"] > 0]
    if known:
        said.append(
            f"Noise would slow a single step along the gradient by a factor of {max(known):.2f} at most, were its "
            f"learning rate the best one; so say {len(known)} of the {len(seen)} points that were monitor, and in "
            "the others the trace was below 0 and says nothing. It is not what noise costs an arm, "
            "[as is said below](#noise-in-a-step-and-in-an-arm)."
        )
    base = final(found, "mixed 10%, epsilon 8")
    resets = {name: final(found, f"mixed 10%, epsilon 8, reset {name}") for name in ("none", "squares", "count")}
    if len(base) and all(len(each) == len(base) for each in resets.values()):
        others = ", ".join(f"{name} {losses.mean():.3f}" for name, losses in resets.items())
        best = "best" if base.mean() < min(each.mean() for each in resets.values()) else "not best"
        said.append(f"Forgetting the momentum alone ({base.mean():.3f}) is {best} among the resets ({others}).")
    return said


def monitor(found: Mapping[str, Any], name: str) -> list[tuple[int, dict]]:
    """What was monitored of an arm in its first seed."""
    runs = found["arms"].get(name, {})
    return [tuple(each) for each in next(iter(runs.values()))["monitor"]] if runs else []


def reconciled(found: Mapping[str, Any]) -> str:
    """Why noise may take much of the gap between arms although single steps hardly feel it."""
    rate = found["rates"]["private"]
    times = [
        rate * values["clipped"] / values["learning_rate"]
        for name in MONITORED
        for _, values in monitor(found, name)
        if values["trace"] > 0
    ]
    if not times:
        return ""
    length = noise_length(found, MONITORED[0])
    inflated = length**2 / (1 + length**2)
    return f"""
### Noise in a step and in an arm

The slow-down above and the part of the gap that the arms put down to noise are answers to two questions.

- Known: the slow-down is that of one step of gradient descent in Adam's metric, with the best learning rate of a
  quadratic. The arms' rate, {rate:g}, is {min(times):.2g} to {max(times):.2g} times that. From twice on, the quadratic
  says, a step gains nothing; the arms did gain, so it does not describe their steps, which have momentum besides.
- Known: that metric is the noisy arm's own, with and without noise. Noise is {length:.1f} long and the mean of clipped
  gradients at most 1, so that noise makes {inflated:.0%} or more of the squares by which Adam divides and shortens what
  a step goes along the gradient. How much of the gap that takes was not measured.
- Known: "clipped, no noise" has the rate that was chosen with noise; at its own best one it may do better, and noise's
  part of the gap would be larger.
- Conjecture: what a quadratic sees is a few steep directions, across which steps swing back and forth, while what is
  gained in the long run lies in flat ones, where noise is a larger part of what is seen.
"""


def at_the_end(rates: Mapping[str, Any]) -> str:
    """Which chosen learning rates are the first or the last that was tried."""
    said = []
    for kind, losses in rates["tried"].items():
        tried = sorted(map(float, losses))
        for end, word in ((0, "smaller"), (-1, "larger")):
            if len(tried) > 1 and rates[kind] == tried[end]:
                said.append(f"That of {kind} steps is the end of what was tried: a {word} one may do better.")
    return " ".join(said)


def draw(found: Mapping[str, Any], path: Path) -> None:
    """Losses by step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2))
    colors = {"fully public": "0.2", "only public": "0.6", "clipped, no noise": "tab:purple"} | dict(
        zip(SHARES, ("tab:red", "tab:orange", "tab:green"), strict=True)
    )
    for axis, epsilon in zip(axes, (2.0, 8.0)):
        for share, color in colors.items():
            name = share if share in found["arms"] else f"{share}, epsilon {epsilon:g}"
            runs = list(found["arms"].get(name, {}).values())
            if not runs:
                continue
            steps = [step for step, _ in runs[0]["losses"]]
            values = np.array([[loss for _, loss in run["losses"]] for run in runs])
            axis.plot(steps, values.mean(0), color=color, label=share)
            axis.fill_between(steps, values.min(0), values.max(0), color=color, alpha=0.15, linewidth=0)
            if 0 < runs[0]["switch"] < steps[-1] and runs[0]["noise_multiplier"]:
                axis.axvline(runs[0]["switch"], color=color, linestyle=":", linewidth=1)
        axis.set(title=f"epsilon {epsilon:g}", xlabel="step", ylabel="held-out loss, nats per byte")
        axis.legend(frameon=False)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def text(found: Mapping[str, Any]) -> str:
    """The page."""
    scale, rates = found["settings"], found["rates"]
    seen = {name: monitor(found, name) for name in MONITORED}
    lines = ["| arm | step | gradient | G'HG | tr(H) | decelerator | slow-down | best batch |", "|---|" + "---|" * 7]
    for name, each in seen.items():
        for step, values in each[:: max(len(each) // 5, 1)]:
            fields = ("gradient", "curvature", "trace", "decelerator", "slowdown", "best_batch")
            unknown = OF_THE_TRACE if values["trace"] <= 0 else ()
            cells = ["unknown" if field in unknown else f"{values[field]:.3g}" for field in fields]
            lines.append(f"| {name} | {step} | {' | '.join(cells)} |")
    said = "\n".join(f"- {sentence}" for sentence in verdicts(found))
    tried = "; ".join(
        f"{kind}: " + ", ".join(f"{rate} {loss:.3f}" for rate, loss in losses.items())
        for kind, losses in rates["tried"].items()
    )
    end = f"{at_the_end(rates)}\n" if at_the_end(rates) else ""
    probes = f" ({scale['probes']})" if "probes" in scale else ""
    return f"""# Public, then private pre-training

`python -m experiments.dp_pretraining` trains a decoder of {found["parameters"]:,} parameters, byte by byte, on source code: that of
Python's standard library is public, that of installed packages private ({scale["private"]:,} sequences of 64 bytes, each a
unit), and other files of those packages are what the loss is measured on. {scale["steps"]} steps of {scale["batch"]} units; AUTO-S
clipping, DP-AdamW, delta 1e-6, adjacency zero-out; the public phase is a share of the steps, after which the momentum
is forgotten. Recipe and analysis: [privacy](../privacy.md#first-public-then-private), [arXiv 2402.18752](https://arxiv.org/abs/2402.18752).

![Held-out loss by step](dp_pretraining.png)

*Means and ranges over seeds; a dotted line is where an arm goes from public to private data.*

{table(found)}

{said}

The noise of a private step from scratch at epsilon 8 is {noise_length(found, "fully private, epsilon 8"):.1f} long, sigma / batch *
sqrt(parameters), and a mean of clipped gradients at most 1.
{reasons(found)}
## What was monitor

From public sequences alone, in the metric of Adam, first seed: the squared gradient, the curvature along it, the trace
of the Hessian, the decelerator, by how much noise slows a step, and the batch whose units gain most. Where the
probes{probes} give a trace below 0, what follows from it is unknown.

![What was monitored](dp_pretraining_monitored.png)

{chr(10).join(lines)}

The learning rates ({rates["plain"]:g} for plain steps, {rates["private"]:g} for private ones) were chosen on public data,
which stood in for private ones ({tried}).
{end}{reconciled(found)}{sections.steps(found)}{sections.noise(found)}{sections.rules(found)}{sections.attacks(found)}"""


def write(found: Mapping[str, Any], page: Path) -> None:
    """The page and its figures."""
    page.write_text(text(found))
    draw(found, page.with_suffix(".png"))
    hidden = (*OF_THE_TRACE, "private", "critical_batch")
    runs = {
        name: [
            values | {"step": step} | dict.fromkeys(hidden if values["trace"] <= 0 else (), math.nan)
            for step, values in monitor(found, name)
        ]
        for name in MONITORED
    }
    path = page.with_name(f"{page.stem}_monitored.png")
    report.draw_improvement(runs, path, "from public data, in Adam's metric, first seed")
    if found.get("noise"):
        sections.draw_noise(found, page.with_name(f"{page.stem}_noise.png"))
    if sections.stepped(found):
        sections.draw_steps(found, page.with_name(f"{page.stem}_steps.png"))
