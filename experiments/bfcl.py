"""First runs of both presets: `python -m experiments.bfcl` regenerates docs/results/bfcl.md, bfcl.json and runs.png.

It runs `train.py` and `train.py shiq-bfcl` with their defaults (or goes on with runs that stopped, or reads finished
ones) and writes what they measured, whatever it is. `--quick` runs a fraction of both, to try the script itself.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
from pathlib import Path

import tyro

import train
from shiq_jax.training.config import Job
from shiq_jax.training.metrics import MetricsLog
from shiq_jax.training.pipeline import train as run_job
from shiq_jax.training.run_directory import RunDirectory, write_json


@dataclasses.dataclass(frozen=True)
class Options:
    """Where the runs are kept and where the page goes."""

    runs: Path | None = None
    """Directory of both runs, whose finished ones are read and stopped ones go on; default: runs/experiments."""
    out: Path | None = None
    """Directory of the page; default: docs/results, or beside the runs with --quick."""
    quick: bool = False
    """A fraction of both runs, in runs/experiments-quick."""


def main(options: Options) -> None:
    """Run what is missing and write the page."""
    runs = options.runs or Path("runs/experiments-quick" if options.quick else "runs/experiments")
    out = options.out or (runs / "page" if options.quick else Path("docs/results"))
    jobs = [train.embedded(train.Shiq()), train.function_calling(train.ShiqBfcl())]
    directories = {job.command: RunDirectory(runs / job.command) for job in jobs}
    for job in map(_quick, jobs) if options.quick else jobs:
        run = directories[job.command]
        if not run.summary.exists():
            run_job(dataclasses.replace(job, output_dir=run.path, resume=run.config.exists()))
    out.mkdir(parents=True, exist_ok=True)
    draw(directories, out / "runs.png")
    summaries = {name: json.loads(run.summary.read_text()) for name, run in directories.items()}
    write_json(out / "bfcl.json", summaries)
    (out / "bfcl.md").write_text(render(directories["shiq-bfcl"], summaries["shiq-bfcl"]))


def _quick(job: Job) -> Job:
    small = dataclasses.replace
    return small(
        job,
        epochs=1,
        batch_size=4,
        warm_start=small(job.warm_start, steps=2, batch_size=2, demonstrations=8),
        collection=small(job.collection, prompts=8, prompts_per_batch=4),
        evaluation=small(job.evaluation, prompts=4, prompts_per_batch=4, samples_per_prompt=1, times=1),
    )


def draw(runs: dict[str, RunDirectory], path: Path) -> None:
    """One row of panels per run: reward of fresh samples, KL to the reference, loss."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    titles = {"shiq": "embedded default: sorting digits", "shiq-bfcl": "SmolLM2-135M on function calling"}
    figure, axes = plt.subplots(len(runs), 3, figsize=(10.5, 2.7 * len(runs)), layout="constrained", squeeze=False)
    for row, (name, run) in zip(axes, runs.items()):
        log = MetricsLog(run.metrics)
        points, updates = log.rows("evaluation"), log.rows("update")
        steps = [point["step"] for point in points]
        for panel, key, color in ((row[0], "reward", "tab:green"), (row[1], "kl", "tab:red")):
            values, errors = ([point[suffix] for point in points] for suffix in (key, f"{key}_stderr"))
            panel.plot(steps, values, marker="o", color=color, label="fresh samples")
            low, high = ([v + sign * e for v, e in zip(values, errors)] for sign in (-1, 1))
            panel.fill_between(steps, low, high, color=color, alpha=0.2, linewidth=0)
        if "greedy_reward" in points[0]:
            row[0].plot(
                steps, [point["greedy_reward"] for point in points], ":", marker=".", color="0.4", label="greedy"
            )
            row[0].legend(frameon=False, fontsize=8, loc="upper left" if name == "shiq-bfcl" else "lower right")
        row[2].plot(
            [update["step"] for update in updates],
            [update["loss"] for update in updates],
            color="tab:blue",
            linewidth=1,
        )
        row[0].set_ylim(0, 1)
        row[1].set_ylim(bottom=0)
        row[0].set_ylabel(titles[name], fontsize=8)
        for panel, title in zip(
            row, ("reward on held-out prompts", "KL to the reference, nats per sequence", "ShiQ loss")
        ):
            panel.set_title(title, fontsize=9)
            panel.set_xlabel("update", fontsize=8)
            panel.grid(alpha=0.3)
            panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130, metadata={"Software": None})
    plt.close(figure)


def render(run: RunDirectory, summary: dict) -> str:
    """The page of the function-calling run."""
    options, machine = json.loads(run.config.read_text()), summary["machine"]
    warm, collection, held_out = options["warm_start"], options["collection"], options["evaluation"]["prompts"]
    evaluations = MetricsLog(run.metrics).rows("evaluation")
    date = datetime.date.fromtimestamp(run.summary.stat().st_mtime)
    serves = (
        "so they serve as the reference's" if summary["probe"]["passed"] else "so they do not serve as the reference's"
    )
    story = (
        f"{warm['steps']} supervised updates of {warm['batch_size']} demonstrations make the reference. It answers "
        f"{collection['prompts']} other training questions\n{collection['samples_per_prompt']} times each, with at most "
        f"{collection['sampling']['max_tokens']} tokens. {summary['updates']} ShiQ updates of {options['batch_size']} "
        f"questions with all their answers\n(beta {options['loss']['beta']}, learning rate "
        f"{options['optimizer']['learning_rate']:g}, rewards relative to the mean of a question's answers) make the "
        f"policy.\nBoth are measured on the same {held_out} held-out questions."
    )
    return f"""# Function calling: a first run

SmolLM2-135M-Instruct, fp32, on the single-turn Python categories of the Berkeley Function Calling Leaderboard
(simple_python, multiple, parallel, parallel_multiple), split by connected components of question and function name, so
that no function of a held-out question was seen. The reward is 1 where the official AST checker accepts the answer.

    pip install -e '.[fetch]' && python -m shiq_jax.data.fetch && python train.py shiq-bfcl

{story}

| | reference | after ShiQ |
|---|---|---|
| accuracy of one sample at temperature 1 | {_with_error(summary, "before")} | {_with_error(summary, "after")} |
| accuracy of greedy decoding | {summary["greedy_reward_before"]:.3f} | {summary["greedy_reward_after"]:.3f} |
| KL to the reference, nats per sequence | 0 | {summary["kl"]:.2f} ± {summary["kl_stderr"]:.2f} |
| mean length of a sample, tokens | {evaluations[0]["length"]:.1f} | {evaluations[-1]["length"]:.1f} |

{_verdict(summary, held_out)}

± is one standard error over questions. This is one seed ({summary["seed"]}) and {held_out} questions: a difference
below about {2 * 0.5 / held_out**0.5:.2f} says nothing. The buffer holds {summary["records"]} answers in
{summary["buffer_bytes"] / 1e6:.1f} MB. The sampler's statistics differed from the update step's by at most
{_largest(summary["probe"]):.1e} nats per token, {serves}.

{machine["cpu_cores"]} CPU cores shared with other work ({machine["device"]}), jax {machine["jax"]}, Python
{machine["python"]}, {date}: {summary["seconds"] / 60:.0f} minutes, {summary["tokens_per_second"]:.0f} real tokens per
second through the update step. All numbers: [bfcl.json](bfcl.json). This page is written by
`python -m experiments.bfcl`.

![Learning curves of both presets](runs.png)
"""


def _with_error(summary: dict, when: str) -> str:
    return f"{summary[f'reward_{when}']:.3f} ± {summary[f'reward_stderr_{when}']:.3f}"


def _verdict(summary: dict, questions: int) -> str:
    """What the table says, in words that follow from the numbers."""
    sampled, greedy = (
        [round(summary[f"{how}reward_{when}"] * questions) for when in ("before", "after")] for how in ("", "greedy_")
    )
    word = "helped" if sampled[1] > sampled[0] else "did harm" if sampled[1] < sampled[0] else "changed nothing"
    return (
        f"These updates {word} at temperature 1: from {sampled[0]} to {sampled[1]} right answers of {questions}, and from "
        f"{greedy[0]} to {greedy[1]} with\ngreedy decoding. Nothing was tuned: this run shows that the whole path works on real "
        "input, not what ShiQ can do on it."
    )


def _largest(probe: dict) -> float:
    return max(probe["max_logratio"], probe["max_lse_difference"])


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
