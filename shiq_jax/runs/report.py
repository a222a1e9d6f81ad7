"""Tables and figures of runs and evaluations."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from shiq_jax.runs.metrics import MetricsLog
from shiq_jax.sharding import hosts


def machine() -> dict[str, Any]:
    """Hardware and library versions of this machine."""
    device = jax.devices()[0]
    return {
        "device": f"{jax.device_count()} x {device.device_kind} ({device.platform})",
        "cpu_cores": os.cpu_count(),
        "python": platform.python_version(),
        "jax": jax.__version__,
    }


def print_table(title: str, rows: Sequence[tuple[str, Any]]) -> None:
    """Print names and values in two columns, with a dash for None."""
    from rich.console import Console
    from rich.table import Table

    table = Table("", "", title=title, show_header=False)
    for name, value in rows:
        table.add_row(name, "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value))
    Console().print(table)


def summary_rows(summary: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The rows of the table that is printed at the end of a run."""
    labels = {
        "reward before": "reward_before",
        "reward after": "reward_after",
        "accuracy before": "accuracy_before",
        "accuracy after": "accuracy_after",
        "greedy accuracy before": "greedy_accuracy_before",
        "greedy accuracy after": "greedy_accuracy_after",
        "KL to the reference (nats per sequence)": "kl",
        "tokens per second (update step)": "tokens_per_second",
        "updates": "updates",
        "seconds": "seconds",
    }
    return [(label, summary.get(name)) for label, name in labels.items() if name in summary]


@hosts.on_writer
def draw_learning_curve(log: MetricsLog, path: Path, title: str) -> None:
    """Plot reward and KL of every evaluation and the loss of every update, as a PNG.

    The band around the reward is one standard error over prompts.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    evaluations, updates = log.rows("evaluation"), log.rows("update")
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.2), layout="constrained")
    steps = [row["step"] for row in evaluations]
    if evaluations and "reward" in evaluations[0]:
        reward, error = ([row[name] for row in evaluations] for name in ("reward", "reward_stderr"))
        axes[0].plot(steps, reward, marker="o", color="tab:green")
        low, high = ([r + sign * e for r, e in zip(reward, error)] for sign in (-1, 1))
        axes[0].fill_between(steps, low, high, color="tab:green", alpha=0.2, linewidth=0)
    axes[0].set(title="reward of fresh samples", xlabel="update")
    axes[1].plot(steps, [row["kl"] for row in evaluations], marker="o", color="tab:red")
    axes[1].set(title="KL to the reference (nats per sequence)", xlabel="update")
    # A private run logs epsilon instead of its loss.
    metric = "epsilon" if any("epsilon" in row for row in updates) else "loss"
    rows = [row for row in updates if metric in row]
    axes[2].plot([row["step"] for row in rows], [row[metric] for row in rows], color="tab:blue", linewidth=1)
    axes[2].set(title=metric, xlabel="update")
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    # Without matplotlib's version stamp, equal runs produce identical files.
    figure.savefig(path, dpi=130, metadata={"Software": None})
    plt.close(figure)


# Panels of the fields of `privacy.loss_improvement`: title -> {field: label}.
_IMPROVEMENT_PANELS = {
    "squared gradient norm": {"gradient": ""},
    "curvature": {"curvature": "along the gradient", "decelerator": "decelerator"},
    "trace of the Hessian": {"trace": ""},
    "loss improvement per update": {"plain": "without noise", "private": "with noise"},
    "slowdown by noise": {"slowdown": ""},
    "batch size in units": {"best_batch": "best", "critical_batch": "critical"},
}


@hosts.on_writer
def draw_improvement(runs: Mapping[str, Sequence[Mapping]], path: Path, title: str) -> None:
    """Plot the loss-improvement diagnostics of private updates, as a PNG.

    Args:
        runs: label -> rows of a run, with `step` and the fields of `privacy.Landscape` and `privacy.Improvement`.
        path: output file.
        title: title of the figure.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(12, 6), layout="constrained")
    for axis, (panel, fields) in zip(axes.flat, _IMPROVEMENT_PANELS.items(), strict=True):
        for number, (run, rows) in enumerate(runs.items()):
            steps = [row["step"] for row in rows]
            for field, style in zip(fields, ("o-", "s:")):
                # A logarithmic scale cannot show values of 0 or less.
                values = [row[field] if row[field] > 0 else math.nan for row in rows]
                label = ", ".join(part for part in (fields[field], run) if part)
                axis.plot(steps, values, style, color=f"C{number}", label=label, markersize=3, linewidth=1)
        axis.set(title=panel, xlabel="update", yscale="log")
        if axis.get_legend_handles_labels()[1]:
            axis.legend(fontsize=7, framealpha=0.7, edgecolor="none")
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    figure.savefig(path, dpi=130, metadata={"Software": None})
    plt.close(figure)


@hosts.on_writer
def draw_evaluation(samples: Sequence[Mapping], path: Path, title: str) -> None:
    """Plot rewards of fresh samples and their log-ratios to the reference, as a PNG.

    Args:
        samples: rows returned by `Evaluator.generations`; greedy ones are not plotted.
        path: output file.
        title: title of the figure.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sampled = [row for row in samples if row["decoding"] == "sampled"]
    rewards, logratios = ([row[name] for row in sampled if row[name] is not None] for name in ("reward", "logratio"))
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
    axes[0].set(title="reward of fresh samples", xlabel="reward", ylabel="samples")
    axes[1].set(title="log-ratio to the reference", xlabel="log-ratio, nats per sequence")
    if rewards:
        axes[0].hist(rewards, bins=20, color="tab:green")
    if logratios and rewards:
        axes[1].scatter(logratios, rewards, s=12, alpha=0.5, color="tab:red", linewidths=0)
        axes[1].set_ylabel("reward")
    elif logratios:
        axes[1].hist(logratios, bins=20, color="tab:red")
    for axis, values in zip(axes, (rewards, logratios), strict=True):
        if not values:
            axis.text(0.5, 0.5, "not measured", ha="center", va="center", transform=axis.transAxes, color="0.5")
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    figure.savefig(path, dpi=130, metadata={"Software": None})
    plt.close(figure)
