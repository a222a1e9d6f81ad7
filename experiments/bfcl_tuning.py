"""Try learning rates and loss options for `experiments.bfcl` on one seed and one buffer.

    python -m experiments.bfcl_tuning

The evaluation questions are the shortest of the category `multiple`, which the small scale does not use.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import tyro

from experiments.bfcl import SCALES, Seed
from shiq_jax.runs.loss_options import RewardLoss
from shiq_jax.runs.options import Job
from shiq_jax.runs.run_directory import write_json, write_jsonl
from shiq_jax.tasks import bfcl, fetch
from shiq_jax.training.optimizers import Optimizer

QUESTIONS = 64


def _optimizer(learning_rate: float) -> dict:
    return {"optimizer": Optimizer(learning_rate=learning_rate)}


def _shiq(learning_rate: float, **loss) -> tuple[str, dict]:
    return "shiq", {"loss": RewardLoss(**loss), **_optimizer(learning_rate)}


TRIALS: dict[str, tuple[str, dict]] = {
    # At beta 0.5 the optimum raises a success probability of 1/3 to 4/5.
    "shiq": _shiq(1e-5, beta=0.5, position_weight="inv_position"),
    "best-1e-5": ("best_of_k", _optimizer(1e-5)),
    "dpo-1e-5": ("dpo", _optimizer(1e-5)),
    "shiq-inv-3e-5": _shiq(3e-5, beta=0.5, position_weight="inv_position"),
    "best-3e-5": ("best_of_k", _optimizer(3e-5)),
    "dpo-3e-6": ("dpo", _optimizer(3e-6)),
    "more-1e-5": ("more_sft", _optimizer(1e-5)),
    "shiq-mean-1e-5": _shiq(1e-5, beta=0.5, normalisation="mean_t"),
    "shiq-sum-1e-5": _shiq(1e-5, beta=0.5),
    "dpo-3e-5": ("dpo", _optimizer(3e-5)),
    "more-3e-5": ("more_sft", _optimizer(3e-5)),
    "shiq-inv-1e-5-beta-2": _shiq(1e-5, beta=2.0, position_weight="inv_position"),
}


class Trial(Seed):
    """Seed 0 with other evaluation questions and half the updates; all trials share its reference and buffer."""

    def __init__(self, root: Path):
        super().__init__(dataclasses.replace(SCALES["small"], epochs=0.5, measured=8), 0, root, root / "path.json")

    def write_questions(self) -> None:
        super().write_questions()
        rows = bfcl.load(fetch.bfcl(), ("multiple",))
        shortest = sorted(rows, key=lambda row: len(row["prompt"][0]["content"]))[:QUESTIONS]
        write_jsonl(self.root / "held_out.jsonl", shortest)

    def job(self, name: str) -> Job:
        policy, options = TRIALS.get(name, (name, {}))
        job = super().job(policy)
        if policy == "shiq" and name != policy:
            job = dataclasses.replace(job, prompts=None, data=str(self.root / "shiq" / "buffer"))
        return dataclasses.replace(job, output_dir=self.root / name, **options)


@dataclasses.dataclass(frozen=True)
class Options:
    """Trials and directories."""

    only: tuple[str, ...] = tuple(TRIALS)
    """Trials to run."""
    runs: Path = Path("runs/bfcl/tuning")
    """Directory of the runs."""
    out: Path = Path("docs/results")
    """Output directory of the page and the results."""


def main(options: Options) -> None:
    """Run the missing trials and write the page."""
    jax.config.update("jax_compilation_cache_dir", str((options.runs.parent / "compiled").absolute()))
    trial = Trial(options.runs)
    trial.write_questions()
    for name in ("warm_start", "shiq"):
        trial.run(name)
    path = options.out / "bfcl" / "tuning.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    for name in ("reference", *options.only):
        if name not in results:
            if name != "reference":
                trial.run(name)
            measured = trial.measure(name)
            gains = np.mean(measured["sampled"], axis=1) - np.mean(trial.measure("reference")["sampled"], axis=1)
            results[name] = {
                "sampled": float(np.mean(measured["sampled"])),
                "sampled_stderr": float(np.std(gains, ddof=1) / np.sqrt(len(gains))),
                "greedy": float(np.mean(measured["greedy"])),
                "kl": float(np.mean(measured["logratio"])),
                "length": float(np.mean(measured["length"])),
            } | ({} if name == "reference" else {"job": trial.training_summary(name)})
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, results)
            print(name, results[name], flush=True)
    (options.out / "bfcl-tuning.md").write_text(render(results))


def render(results: dict) -> str:
    """Render the Markdown page."""
    rows = []
    for name, numbers in results.items():
        job = numbers.get("job")
        options = ", ".join(f"{key} {value}" for key, value in job["loss"].items()) if job else ""
        policy = TRIALS[name][0] if name in TRIALS else name
        rate = f"{job['learning_rate']:g}" if job else ""
        rows.append(
            f"| {policy} | {options} | {rate} | {numbers['sampled']:.1%} ± {100 * numbers['sampled_stderr']:.1f} "
            f"| {numbers['greedy']:.1%} | "
            f"{numbers['kl']:.2f} | {numbers['length']:.1f} |"
        )
    table = "\n".join(rows)
    return f"""# Function calling: tuning trials

| policy | loss options | learning rate | accuracy, sampled | accuracy, greedy | KL | tokens per answer |
|---|---|---|---|---|---|---|
{table}

    python -m experiments.bfcl_tuning

- All trials share one seed (0), one reference and one buffer, with half the updates of [the comparison](bfcl.md).
- Accuracy is measured on {QUESTIONS} questions of the category `multiple`, which the comparison does not use, with
  eight answers sampled at temperature 1 and a greedy one.
- ± is one standard error of the difference from the reference on the same questions.
"""


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
