"""Page and figures of `experiments.dp_pretraining`, rendered from its JSON results."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from experiments import dp_pretraining_sections as sections
from shiq_jax.runs import report

SHARES = ("fully private", "mixed 1%", "mixed 10%")
# Names of the kinds of steps in the JSON results.
KINDS = {"plain": "non-private", "private": "private"}
MONITORED = ("fully private, epsilon 8", "mixed 10%, epsilon 8")
# Metrics that are undefined if the estimated trace is negative.
TRACE_METRICS = ("decelerator", "slowdown", "best_batch")


def final_losses(results: Mapping[str, Any], name: str) -> np.ndarray:
    """Final held-out loss of an arm by seed."""
    return np.array([run["losses"][-1][1] for run in results["arms"].get(name, {}).values()])


def gap_closed(results: Mapping[str, Any], name: str, epsilon: float) -> float:
    """Fraction of the gap between fully private and fully public training that an arm closes, averaged over seeds."""
    worst, best = (
        final_losses(results, f"fully private, epsilon {epsilon:g}").mean(),
        final_losses(results, "fully public").mean(),
    )
    return float((worst - final_losses(results, name).mean()) / (worst - best))


def table(results: Mapping[str, Any]) -> str:
    """Markdown table of all arms."""
    lines = ["| arm | held-out loss, nats per byte | seeds | switch | noise multiplier |", "|---|---|---|---|---|"]
    for name, runs in results["arms"].items():
        losses, run = final_losses(results, name), next(iter(runs.values()), None)
        if run is None:
            continue
        noise = "" if run["noise_multiplier"] is None else f"{run['noise_multiplier']:.3f}"
        by_seed = ", ".join(f"{loss:.3f}" for loss in losses)
        switch = run["switch"] if run["noise_multiplier"] else ""
        lines.append(f"| {name} | {losses.mean():.3f} | {by_seed} | {switch} | {noise} |")
    return "\n".join(lines)


def mean_loss_at(results: Mapping[str, Any], name: str, step: int) -> float:
    """Held-out loss of an arm at a measured step, averaged over seeds."""
    return float(np.mean([dict(map(tuple, run["losses"]))[step] for run in results["arms"][name].values()]))


def ordering_section(results: Mapping[str, Any]) -> str:
    """Section on why public data do not reduce the final loss; empty if they do."""
    names = [f"{share}, epsilon 8" for share in SHARES]
    means = [final_losses(results, name).mean() for name in names]
    if means[0] > means[1] > means[2]:
        return ""
    step = results["arms"][names[0]]["0"]["losses"][3][0]
    without, mixed = (f"{mean_loss_at(results, name, step):.3f}" for name in (names[0], names[2]))
    norm = noise_norm(results, names[0])
    return f"""
## Possible reasons for the different ordering

- Public steps help early: at step {step} and epsilon 8 the loss is {without} without them and {mixed} with 10%. At the
  end the arms are equal.
- The method targets noise, whose norm grows with the square root of the number of parameters, 10^8 in the paper. Here
  its norm is {norm:.1f}, and the mean clipped gradient has norm at most 1. That this is why public data help little
  is a conjecture; no arm tests it.
- Public steps do not recover the loss caused by clipping.
- Repeated public data are worth more than private data at these epsilons: both are Python code, and the model is small.
"""


def noise_norm(results: Mapping[str, Any], name: str) -> float:
    """Expected norm of the noise in the mean gradient of an arm's private step, with clip norm 1."""
    run = next(iter(results["arms"][name].values()))
    return run["noise_multiplier"] / results["settings"]["batch"] * results["parameters"] ** 0.5


def summary(results: Mapping[str, Any]) -> list[str]:
    """Sentences that compare the arms with the orderings of the paper."""
    sentences = []
    for epsilon in (2.0, 8.0):
        names = [f"{share}, epsilon {epsilon:g}" for share in SHARES]
        losses = [final_losses(results, name) for name in names]
        if not all(map(len, losses)):
            continue
        means = [seed_losses.mean() for seed_losses in losses]
        verb = "reduces" if means[0] > means[1] > means[2] else "does not reduce"
        closed = [f"{gap_closed(results, name, epsilon):.0%}" for name in names[1:]]
        sentences.append(
            f"At epsilon {epsilon:g} a public phase {verb} the final loss: {means[0]:.3f} without, {means[1]:.3f} "
            f"with 1% and {means[2]:.3f} with 10% public steps, which closes {closed[0]} and {closed[1]} of the gap to "
            "non-private training on all data."
        )
        public_only = final_losses(results, "only public")
        improved = sum(mixed < alone for mixed, alone in zip(losses[2], public_only))
        sentences.append(
            f"With 10% public steps private data improve on the public data alone ({public_only.mean():.3f}) in "
            f"{improved} of {len(public_only)} seeds at epsilon {epsilon:g}."
        )
    public, clipped, private = (
        final_losses(results, name).mean() if len(final_losses(results, name)) else np.nan
        for name in ("fully public", "clipped, no noise", "fully private, epsilon 8")
    )
    if np.isfinite(clipped):
        part = (clipped - public) / (private - public)
        sentences.append(
            f"Clipping without noise reaches {clipped:.3f}: at epsilon 8 clipping causes {part:.0%} and noise "
            f"{1 - part:.0%} of the {private - public:.3f} nats between non-private and private training, at the "
            "learning rate chosen for private steps."
        )
    monitored = [values for name in MONITORED for _, values in diagnostics(results, name)]
    slowdowns = [values["slowdown"] for values in monitored if values["trace"] > 0]
    if slowdowns:
        sentences.append(
            f"Noise slows a single step at its optimal learning rate by a factor of at most {max(slowdowns):.2f}, at "
            f"the {len(slowdowns)} of {len(monitored)} monitored states with a positive trace estimate; the cost of "
            "noise for a run [is a different quantity](#noise-in-a-step-and-in-a-run)."
        )
    base = final_losses(results, "mixed 10%, epsilon 8")
    resets = {
        name: final_losses(results, f"mixed 10%, epsilon 8, reset {name}") for name in ("none", "squares", "count")
    }
    if len(base) and all(len(losses) == len(base) for losses in resets.values()):
        listed = ", ".join(f"{name} {losses.mean():.3f}" for name, losses in resets.items())
        best = "the best" if base.mean() < min(losses.mean() for losses in resets.values()) else "not the best"
        sentences.append(f"Resetting only the momentum ({base.mean():.3f}) is {best} of the resets ({listed}).")
    return sentences


def diagnostics(results: Mapping[str, Any], name: str) -> list[tuple[int, dict]]:
    """Loss-improvement diagnostics of an arm's first seed, by step."""
    runs = results["arms"].get(name, {})
    return [(step, values) for step, values in next(iter(runs.values()))["monitored"]] if runs else []


def noise_section(results: Mapping[str, Any]) -> str:
    """Section on why noise may cost a run much more than a single step."""
    rate = results["rates"]["private"]
    rate_ratios = [
        rate * values["clipped"] / values["learning_rate"]
        for name in MONITORED
        for _, values in diagnostics(results, name)
        if values["trace"] > 0
    ]
    if not rate_ratios:
        return ""
    norm = noise_norm(results, MONITORED[0])
    noise_part = norm**2 / (1 + norm**2)
    low, high = min(rate_ratios), max(rate_ratios)
    return f"""
### Noise in a step and in a run

The slowdown of a single step does not contradict the cost of noise for a run:

- The slowdown applies to one gradient step with Adam's preconditioner and the optimal learning rate of a quadratic
  model. The learning rate of the runs, {rate:g}, is {low:.2g} to {high:.2g} times as large. In the quadratic model a
  step at twice the optimal rate gains nothing, so the model does not describe the runs, which also use momentum.
- The preconditioner is that of the noisy run, with and without noise. The noise has norm {norm:.1f} and the mean
  clipped gradient at most 1, so noise makes up at least {noise_part:.0%} of the second moment by which Adam divides,
  which shortens the steps. This effect was not measured.
- "Clipped, no noise" uses the learning rate chosen with noise. At its optimal rate it may do better, which would
  increase the share of noise.
- Conjecture: the quadratic model describes a few steep directions in which the steps oscillate, whereas long-term
  progress happens in flat directions, where noise is relatively larger.
"""


def boundary_sentences(rates: Mapping[str, Any]) -> str:
    """Sentences on the learning rates that are at the boundary of the grid."""
    sentences = []
    for kind, losses in rates["tried"].items():
        grid = sorted(map(float, losses))
        for end, direction in ((0, "smaller"), (-1, "larger")):
            if len(grid) > 1 and rates[kind] == grid[end]:
                sentences.append(
                    f"The rate of {KINDS[kind]} steps is at the boundary of the grid; a {direction} one may be better."
                )
    return " ".join(sentences)


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Plot held-out loss by step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2))
    colors = {"fully public": "0.2", "only public": "0.6", "clipped, no noise": "tab:purple"} | dict(
        zip(SHARES, ("tab:red", "tab:orange", "tab:green"), strict=True)
    )
    for axis, epsilon in zip(axes, (2.0, 8.0)):
        for share, color in colors.items():
            name = share if share in results["arms"] else f"{share}, epsilon {epsilon:g}"
            runs = list(results["arms"].get(name, {}).values())
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


def render(results: Mapping[str, Any]) -> str:
    """Render the Markdown page."""
    settings, rates = results["settings"], results["rates"]
    lines = ["| arm | step | gradient | G'HG | tr(H) | decelerator | slowdown | best batch |", "|---|" + "---|" * 7]
    for name in MONITORED:
        rows = diagnostics(results, name)
        for step, values in rows[:: max(len(rows) // 5, 1)]:
            fields = ("gradient", "curvature", "trace", "decelerator", "slowdown", "best_batch")
            unknown = TRACE_METRICS if values["trace"] <= 0 else ()
            cells = ["unknown" if field in unknown else f"{values[field]:.3g}" for field in fields]
            lines.append(f"| {name} | {step} | {' | '.join(cells)} |")
    findings = summary(results)
    headline = [sentence for sentence in findings if " public phase " in sentence]
    details = "\n".join(f"- {sentence}" for sentence in findings if sentence not in headline)
    trials = "; ".join(
        f"{KINDS[kind]}: " + ", ".join(f"{rate} {loss:.3f}" for rate, loss in losses.items())
        for kind, losses in rates["tried"].items()
    )
    boundary = f" {boundary_sentences(rates)}" if boundary_sentences(rates) else ""
    probes = f"{settings['probes']} probes" if "probes" in settings else "the probes"
    norm = noise_norm(results, "fully private, epsilon 8")
    further = "".join(
        section(results)
        for section in (noise_section, sections.steps, sections.noise, sections.rules, sections.attacks)
    )
    return f"""# Public-to-private pretraining

{" ".join(headline)}

{table(results)}

![Held-out loss by step](dp_pretraining.png)

*Means and ranges over seeds; dotted lines mark the switch from public to private data.*

    python -m experiments.dp_pretraining

{details}
- A byte-level decoder with {results["parameters"]:,} parameters is trained on Python source code: the standard library
  is public, installed packages are private ({settings["private"]:,} sequences of 64 bytes, each a unit).
- The loss is measured on held-out files of the same packages.
- Each arm runs {settings["steps"]} steps of {settings["batch"]} units in expectation, with AUTO-S clipping, DP-AdamW,
  delta 1e-6 and zero-out adjacency.
- The public phase is a fraction of the steps; the momentum is reset at its end.
- The method and its analysis are described in [privacy](../privacy.md#first-public-then-private) and
  [arXiv 2402.18752](https://arxiv.org/abs/2402.18752).
- At epsilon 8 the noise in a private step from scratch has norm {norm:.1f} (sigma / batch * sqrt(parameters)); the mean
  clipped gradient has norm at most 1.
- Learning rates ({rates["plain"]:g} non-private, {rates["private"]:g} private) are chosen on public data by held-out
  loss ({trials}).{boundary}
{ordering_section(results)}
## Loss-improvement diagnostics

{chr(10).join(lines)}

![Loss-improvement diagnostics](dp_pretraining_monitored.png)

The diagnostics use public sequences only, with Adam's preconditioner and the first seed. The columns are the squared
gradient norm, the curvature along the gradient, the trace of the Hessian, the decelerator, the slowdown of a step by
noise, and the batch size with the highest improvement per unit. If {probes} estimate a negative trace, the last three
are unknown.
{further}"""


def write(results: Mapping[str, Any], page: Path) -> None:
    """Write the page and its figures."""
    page.write_text(render(results))
    draw(results, page.with_suffix(".png"))
    hidden = (*TRACE_METRICS, "private", "critical_batch")
    runs = {
        name: [
            values | {"step": step} | dict.fromkeys(hidden if values["trace"] <= 0 else (), math.nan)
            for step, values in diagnostics(results, name)
        ]
        for name in MONITORED
    }
    path = page.with_name(f"{page.stem}_monitored.png")
    report.draw_improvement(runs, path, "public data, Adam preconditioner, first seed")
    if results.get("noise"):
        sections.draw_noise(results, page.with_name(f"{page.stem}_noise.png"))
    if sections.measured_points(results):
        sections.draw_steps(results, page.with_name(f"{page.stem}_steps.png"))
