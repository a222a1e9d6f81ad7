"""Training curves of the built-in toy task: `python -m experiments.toy` draws docs/results/toy.png.

python -m experiments.toy --quick    test the script with a few updates
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import tyro

from shiq_jax.runs import commands
from shiq_jax.runs.metrics import MetricsLog
from shiq_jax.runs.options import Job
from shiq_jax.runs.pipeline import train as run_job
from shiq_jax.runs.run_directory import RunDirectory


@dataclasses.dataclass(frozen=True)
class Options:
    """Directories of the run and the figure."""

    runs: Path = Path("runs/toy")
    """Run directory; an interrupted run is resumed, a finished one is only read."""
    out: Path = Path("docs/results")
    """Output directory of the figure."""
    quick: bool = False
    """Test the script with a few updates; writes only to runs/toy-quick."""


def main(options: Options) -> None:
    """Train unless the run is finished, and draw the figure."""
    quick = options.runs.with_name("toy-quick")
    run, out = (RunDirectory(quick / "run"), quick) if options.quick else (RunDirectory(options.runs), options.out)
    if not run.summary.exists():
        job = commands.toy_defaults(commands.Shiq())
        job = quick_job(job) if options.quick else job
        run_job(dataclasses.replace(job, output_dir=run.path, resume=run.config.exists()))
    draw(MetricsLog(run.metrics), out / "toy.png")


def quick_job(job: Job) -> Job:
    """Reduce all sizes of the job."""
    return dataclasses.replace(
        job,
        epochs=1.0,
        warm_start=dataclasses.replace(job.warm_start, steps=2, batch_size=4, demonstrations=8),
        collection=dataclasses.replace(job.collection, prompts=4, prompts_per_batch=4, samples_per_prompt=2),
        evaluation=dataclasses.replace(job.evaluation, prompts=2, samples_per_prompt=1, times=1),
    )


def draw(log: MetricsLog, path: Path) -> None:
    """Plot reward, KL to the reference and loss over the updates."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 3, figsize=(10.5, 2.7), layout="constrained")
    evaluations, updates = log.rows("evaluation"), log.rows("update")
    steps = [row["step"] for row in evaluations]
    for panel, key, color in ((panels[0], "reward", "tab:green"), (panels[1], "kl", "tab:red")):
        values, errors = ([row[name] for row in evaluations] for name in (key, f"{key}_stderr"))
        panel.plot(steps, values, marker="o", color=color, label="samples at temperature 1")
        low, high = ([value + sign * error for value, error in zip(values, errors)] for sign in (-1, 1))
        panel.fill_between(steps, low, high, color=color, alpha=0.2, linewidth=0)
    greedy = [row["greedy_reward"] for row in evaluations]
    panels[0].plot(steps, greedy, ":", marker=".", color="0.4", label="greedy")
    panels[0].legend(frameon=False, fontsize=8, loc="lower right")
    panels[2].plot([update["step"] for update in updates], [update["loss"] for update in updates], linewidth=1)
    panels[0].set_ylim(0, 1)
    panels[1].set_ylim(bottom=0)
    titles = ("reward on held-out prompts", "KL to the reference, nats per answer", "ShiQ loss")
    for panel, title in zip(panels, titles):
        panel.set_title(title, fontsize=9)
        panel.set_xlabel("update", fontsize=8)
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130, metadata={"Software": None})
    plt.close(figure)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
