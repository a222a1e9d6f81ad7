"""Options of the policies of `experiments.bfcl`, tried on questions that it does not measure: one seed, one buffer.

    python -m experiments.bfcl_tuning

The questions are the shortest of the category `multiple`, which the small scale neither learns from nor measures on.
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


def _rate(rate: float) -> dict:
    return {"optimizer": Optimizer(learning_rate=rate)}


def _shiq(rate: float, **loss) -> tuple[str, dict]:
    return "shiq", {"loss": RewardLoss(**loss), **_rate(rate)}


CANDIDATES: dict[str, tuple[str, dict]] = {
    # At beta 0.5 an answer that is right one time in three is right four times in five at the optimum.
    "shiq": _shiq(1e-5, beta=0.5, position_weight="inv_position"),
    "best-1e-5": ("best_of_k", _rate(1e-5)),
    "dpo-1e-5": ("dpo", _rate(1e-5)),
    "shiq-inv-3e-5": _shiq(3e-5, beta=0.5, position_weight="inv_position"),
    "best-3e-5": ("best_of_k", _rate(3e-5)),
    "dpo-3e-6": ("dpo", _rate(3e-6)),
    "more-1e-5": ("more_sft", _rate(1e-5)),
    "shiq-mean-1e-5": _shiq(1e-5, beta=0.5, normalisation="mean_t"),
    "shiq-sum-1e-5": _shiq(1e-5, beta=0.5),
    "dpo-3e-5": ("dpo", _rate(3e-5)),
    "more-3e-5": ("more_sft", _rate(3e-5)),
    "shiq-inv-1e-5-beta-2": _shiq(1e-5, beta=2.0, position_weight="inv_position"),
}


class Trial(Seed):
    """Seed 0 with other options, other questions and half the updates; all trials share its reference and buffer."""

    def __init__(self, root: Path):
        super().__init__(dataclasses.replace(SCALES["small"], epochs=0.5, measured=8), 0, root, root / "kept.json")

    def _write_questions(self) -> None:
        super()._write_questions()
        rows = bfcl.load(fetch.bfcl(), ("multiple",))
        shortest = sorted(rows, key=lambda row: len(row["prompt"][0]["content"]))[:QUESTIONS]
        write_jsonl(self.root / "held_out.jsonl", shortest)

    def job(self, name: str) -> Job:
        kind, options = CANDIDATES.get(name, (name, {}))
        job = super().job(kind)
        if kind == "shiq" and name != kind:
            job = dataclasses.replace(job, prompts=None, data=str(self.root / "shiq" / "buffer"))
        return dataclasses.replace(job, output_dir=self.root / name, **options)


@dataclasses.dataclass(frozen=True)
class Options:
    """What to try and where."""

    only: tuple[str, ...] = tuple(CANDIDATES)
    """Which candidates."""
    runs: Path = Path("runs/bfcl/tuning")
    """Where the runs are kept."""
    out: Path = Path("docs/results")
    """Where the page goes."""


def main(options: Options) -> None:
    """Run what is missing and write the page."""
    jax.config.update("jax_compilation_cache_dir", str((options.runs.parent / "compiled").absolute()))
    trial = Trial(options.runs)
    trial._write_questions()
    for name in ("warm_start", "shiq"):
        trial._run(name)
    kept = options.out / "bfcl" / "tuning.json"
    found = json.loads(kept.read_text()) if kept.exists() else {}
    for name in ("reference", *options.only):
        if name not in found:
            if name != "reference":
                trial._run(name)
            measured = trial._measure(name)
            gained = np.mean(measured["sampled"], axis=1) - np.mean(trial._measure("reference")["sampled"], axis=1)
            found[name] = {
                "sampled": float(np.mean(measured["sampled"])),
                "sampled_stderr": float(np.std(gained, ddof=1) / np.sqrt(len(gained))),
                "greedy": float(np.mean(measured["greedy"])),
                "kl": float(np.mean(measured["logratio"])),
                "length": float(np.mean(measured["length"])),
            } | ({} if name == "reference" else {"job": trial._learning(name)})
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_json(kept, found)
            print(name, found[name], flush=True)
    (options.out / "bfcl-tuning.md").write_text(render(found))


def render(found: dict) -> str:
    """The page."""
    rows = []
    for name, numbers in found.items():
        job = numbers.get("job")
        options = ", ".join(f"{key} {value}" for key, value in job["loss"].items()) if job else ""
        kind = CANDIDATES[name][0] if name in CANDIDATES else name
        rate = f"{job['learning_rate']:g}" if job else ""
        rows.append(
            f"| {kind} | {options} | {rate} | {numbers['sampled']:.1%} ± {100 * numbers['sampled_stderr']:.1f} "
            f"| {numbers['greedy']:.1%} | "
            f"{numbers['kl']:.2f} | {numbers['length']:.1f} |"
        )
    table = "\n".join(rows)
    return f"""# Function calling: the options that were tried

One seed (0), one reference, one buffer, half the updates of [the comparison](bfcl.md); {QUESTIONS} questions of the
category `multiple`, which the comparison neither learns from nor measures on; eight answers each at temperature 1 and a
greedy one. ± is one standard error of the difference from the reference on the same questions.

| policy | loss options | learning rate | right, sampled | right, greedy | KL | tokens |
|---|---|---|---|---|---|---|
{table}

`python -m experiments.bfcl_tuning` writes this page.
"""


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
