"""Utility against epsilon of private preference tuning with DPO and ShiQ: `python -m experiments.dp_alignment`.

A short warm start on public demonstrations produces the reference, which answers further questions of the Berkeley
Function Calling Leaderboard. The private data are pairs of a correct and an incorrect answer; the unit of privacy is a
question with both answers. DPO and ShiQ tune LoRA adapters without privacy, with clipping only, and at several values
of epsilon. Policies are evaluated on held-out questions; learning rates are chosen on other, public questions.

    python -m experiments.dp_alignment                full experiment, an hour and a half on two cores
    python -m experiments.dp_alignment --quick        test the script in minutes

Every arm is a run of train.py and resumes if interrupted; results of finished arms are stored in
docs/results/dp_alignment and not recomputed.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import tyro

from experiments import dp_alignment_page
from experiments.dp_alignment_data import Sizes, read_rows, write_pair_files, write_pairs, write_questions
from experiments.dp_alignment_measure import mean_loss, measure
from experiments.dp_alignment_plans import plans
from shiq_jax.models import load_hf
from shiq_jax.models.lora import only_adapters
from shiq_jax.runs import commands, report
from shiq_jax.runs.loss_options import PairLoss, RewardLoss
from shiq_jax.runs.metrics import MetricsLog
from shiq_jax.runs.options import Adapters, Evaluation, Job, Precision
from shiq_jax.runs.pipeline import train as run_job
from shiq_jax.runs.private_options import Privacy
from shiq_jax.runs.run_directory import RunDirectory, read_json, write_json
from shiq_jax.tasks import fetch
from shiq_jax.training.optimizers import Optimizer

METHODS = ("dpo", "shiq")
# File kind that each method trains on; both contain the same answers.
FILE_KINDS = {"dpo": "pairs", "shiq": "answers"}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of the experiment.

    Attributes:
        sizes: sizes of the data splits.
        steps: full-batch updates per arm.
        epsilons: epsilons of the private arms.
        delta: delta of the private arms, below 1 / units.
        rates: candidate learning rates by method.
        rank: LoRA rank.
        targets: modules with LoRA adapters.
    """

    sizes: Sizes
    steps: int
    epsilons: tuple[float, ...]
    delta: float
    rates: dict[str, tuple[float, ...]]
    rank: int
    targets: tuple[str, ...]


FULL = Settings(
    Sizes(units=128, demonstrations=40, tuning=24, tuning_learned=12, held_out=64, samples=4, max_tokens=64),
    steps=3, epsilons=(2.0, 8.0, 32.0), delta=1e-3, rank=2, targets=("q_proj", "v_proj"),
    # ShiQ overshoots in one update at the larger rates of DPO.
    rates={"dpo": (1e-3, 3e-3, 1e-2), "shiq": (1e-4, 3e-4, 1e-3)},
)  # fmt: skip
QUICK = Settings(
    Sizes(units=6, demonstrations=8, tuning=4, tuning_learned=2, held_out=4, samples=3, max_tokens=32),
    steps=2, epsilons=(2.0, 8.0), delta=1e-2, rank=2, targets=("q_proj", "v_proj"),
    rates={"dpo": (1e-2,), "shiq": (1e-3,)},
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Options:
    """Repetitions and directories."""

    repetitions: int = 1
    """Runs per arm, which differ in the noise, or in the adapter initialization for arms without noise."""
    quick: bool = False
    """Test the script with a few questions; writes only below the runs directory."""
    runs: Path = Path("runs/dp_alignment")
    """Directory of the runs; can be deleted once the results are written."""
    out: Path = Path("docs/results")
    """Output directory of the page and the results."""


@dataclasses.dataclass(frozen=True)
class ClippedOnly(Privacy):
    """Clipping without noise: not private, but separates the cost of clipping from the cost of noise."""

    def mechanism(self, trainable, **kwargs):
        return dataclasses.replace(super().mechanism(trainable, **kwargs), noise_multiplier=0.0)


class Arm(NamedTuple):
    """A method and its privacy: `open` (not private), `clipped` (no noise) or an epsilon."""

    method: str
    privacy: str | float

    @property
    def name(self) -> str:
        """Name of the run and the results file."""
        return f"{self.method}-{self.privacy if isinstance(self.privacy, str) else f'epsilon-{self.privacy:g}'}"


def arms(settings: Settings) -> list[Arm]:
    """All arms in the order in which they run, most informative first."""
    epsilons = sorted(settings.epsilons)
    middle = epsilons[len(epsilons) // 2]
    levels = ["open", middle, *(epsilon for epsilon in epsilons if epsilon != middle), "clipped"]
    return [Arm(method, level) for level in levels for method in METHODS]


def main(options: Options) -> None:
    """Run the missing arms; store the results and write the page after every arm."""
    settings = QUICK if options.quick else FULL
    runs = options.runs / ("quick" if options.quick else "full")
    out = options.runs / "page" if options.quick else options.out
    jax.config.update("jax_compilation_cache_dir", str((options.runs / "compiled").absolute()))
    Study(settings, runs, out, options.repetitions).finish()


class Study:
    """The runs and measurements of the experiment; every step is skipped if its output exists.

    Args:
        settings: settings of the experiment.
        root: directory of the runs.
        out: output directory of the page and the results.
        repetitions: runs per arm.
    """

    def __init__(self, settings: Settings, root: Path, out: Path, repetitions: int):
        self.settings, self.root, self.out, self.repetitions = settings, root, out, repetitions
        self.results = out / "dp_alignment"
        self.reference = root / "warm_start" / "export"

    def finish(self) -> None:
        """Run the missing arms."""
        settings = json.loads(json.dumps(dataclasses.asdict(self.settings)))
        missing = [
            (arm, repetition)
            for repetition in range(self.repetitions)
            for arm in arms(self.settings)
            if not _is_current(self._file(arm.name, repetition), settings)
        ]
        if missing:
            self._prepare(settings)
        for arm, repetition in missing:
            print(f"arm {arm.name}, repetition {repetition}", flush=True)
            self._write_results(self._file(arm.name, repetition), settings, self._run_arm(arm, repetition))
            dp_alignment_page.write(self.out)
        dp_alignment_page.write(self.out)

    def _file(self, name: str, repetition: int = 0) -> Path:
        return self.results / f"{name}-{repetition}.json"

    def _write_results(self, file: Path, settings: dict, numbers: dict[str, Any]) -> None:
        self.results.mkdir(parents=True, exist_ok=True)
        write_json(file, {"settings": settings, "date": datetime.date.today().isoformat()} | numbers)

    def _prepare(self, settings: dict) -> None:
        """Write the plans, the data, the reference and its metrics, and the learning rates."""
        sizes = self.settings.sizes
        study = self.results / "study.json"
        if not _is_current(study, settings):
            rows = plans(sizes.units, self.settings.steps, self.settings.epsilons, self.settings.delta)
            self._write_results(study, settings, {"plans": rows, "machine": report.machine()})
        write_questions(self.root, sizes)
        self._train("warm_start", self._warm_start())
        if not (self.root / "private.pairs.jsonl").exists():
            write_pairs(self.root, self.reference, sizes)
        if not _is_current(self.results / "reference.json", settings):
            metrics = measure(self.reference, None, self.root, sizes)
            metrics["right_answers_sampled"] = float(
                np.mean([row["sampled"] for row in read_rows(self.root / "private.pairs.jsonl")])
            )
            self._write_results(self.results / "reference.json", settings, metrics)
        if not _is_current(self.results / "rates.json", settings):
            self._write_results(
                self.results / "rates.json", settings, {method: self._tune(method) for method in METHODS}
            )

    def _warm_start(self) -> Job:
        return commands.Sft(
            model=str(fetch.smollm2()), data=str(self.root / "demonstrations.jsonl"), epochs=2, batch_size=4,
            optimizer=Optimizer(learning_rate=5e-5, schedule="cosine"), **self._shared_options("warm_start"),
        )  # fmt: skip

    def _shared_options(self, name: str) -> dict[str, Any]:
        return {
            "output_dir": self.root / name,
            "precision": Precision(),
            "save_every": 1 if name != "warm_start" else 100,
            # A minimal evaluation for monitoring; results come from `measure`.
            "evaluation": Evaluation(
                data=str(self.root / "held_out.jsonl"), prompts=1, samples_per_prompt=1, prompts_in_flight=1,
                max_tokens=16, times=0, greedy=False,
            ),
            "reward": "bfcl",
        }  # fmt: skip

    def job(
        self, name: str, method: str, data: str, units: int, rate: float, privacy: Privacy, seed: int = 0
    ) -> Job:  # fmt: skip
        """A full-batch run that tunes LoRA adapters."""
        command, loss = {
            "dpo": (commands.Dpo, PairLoss()),
            # As in experiments.bfcl; at beta 0.5 the optimal log-ratios of the two answers differ by 2 nats.
            "shiq": (commands.Shiq, RewardLoss(beta=0.5, position_weight="inv_position")),
        }[method]
        return command(
            model=str(self.reference), data=str(self.root / f"{data}.{FILE_KINDS[method]}.jsonl"),
            epochs=self.settings.steps, batch_size=units, seed=seed, loss=loss, privacy=privacy,
            # Private runs already process one unit at a time.
            microbatches=1 if privacy.enabled else max(units // 4, 1),
            optimizer=Optimizer(learning_rate=rate, schedule="constant", warmup=0.0),
            lora=Adapters(rank=self.settings.rank, targets=self.settings.targets), **self._shared_options(name),
        )  # fmt: skip

    def privacy(self, level: str | float) -> Privacy:
        """Privacy options of an arm."""
        shared = {"delta": self.settings.delta, "unit": "user", "method": "scan"}
        if level == "open":
            return Privacy()
        if level == "clipped":
            # The arm is not private, so logging unit norms is allowed.
            return ClippedOnly(noise_multiplier=1.0, log_private=True, **shared)
        return Privacy(epsilon=float(level), **shared)

    def _train(self, name: str, job: Job) -> None:
        run = RunDirectory(self.root / name)
        if not run.summary.exists():
            run_job(dataclasses.replace(job, resume=run.config.exists()))

    def _run_arm(self, arm: Arm, repetition: int) -> dict[str, Any]:
        name, privacy = f"{arm.name}-{repetition}", self.privacy(arm.privacy)
        rate = read_json(self.results / "rates.json")[arm.method]["rate"]
        seed = 0 if privacy.enabled else repetition
        self._train(name, self.job(name, arm.method, "private", self.settings.sizes.units, rate, privacy, seed))
        run = RunDirectory(self.root / name)
        metrics = measure(run.export, self.reference, self.root, self.settings.sizes)
        rows = MetricsLog(run.metrics).rows("update")
        keys = ("grad_norm", "loss", "epsilon", "private/norm")
        # Without noise epsilon is infinite, which JSON cannot represent.
        updates = {key: [row[key] for row in rows if math.isfinite(row.get(key, math.inf))] for key in keys}
        accounts = read_json(run.privacy) if run.privacy.exists() else None
        return metrics | {
            "method": arm.method,
            "privacy": arm.privacy,
            "repetition": repetition,
            "learning_rate": rate,
            "parameters": adapter_parameters(self.reference, self.settings),
            "seconds": round(read_json(run.summary)["seconds"]),
            "updates": {key: values for key, values in updates.items() if values},
            "accounts": accounts and {key: value for key, value in finite(accounts).items() if key != "secret"},
        }

    def _tune(self, method: str) -> dict[str, Any]:
        """Choose the learning rate by the loss on public questions after non-private training on other public ones."""
        sizes, losses = self.settings.sizes, {}
        pairs = read_rows(self.root / "tuning.pairs.jsonl")
        write_pair_files(self.root, "tuning_learned", pairs[: sizes.tuning_learned])
        write_pair_files(self.root, "tuning_measured", pairs[sizes.tuning_learned :])
        for rate in self.settings.rates[method]:
            name = f"tuning-{method}-{rate:g}"
            job = self.job(name, method, "tuning_learned", sizes.tuning_learned, rate, Privacy())
            self._train(name, job)
            losses[f"{rate:g}"] = mean_loss(
                job.loss.build(), method, self.root / name / "export", self.reference,
                self.root / f"tuning_measured.{FILE_KINDS[method]}.jsonl", self.root / "tuning_measured" / name,
            )  # fmt: skip
            print(f"{method} at {rate:g}: loss {losses[f'{rate:g}']:.4f} on public questions", flush=True)
        return {"rate": float(min(losses, key=losses.get)), "losses": losses}


def adapter_parameters(reference: Path, settings: Settings) -> int:
    """Number of adapter parameters, which is also the dimension of the noise."""
    model, params = load_hf(str(reference))
    lora = Adapters(rank=settings.rank, targets=settings.targets).build()
    params = dataclasses.replace(model, lora=lora).with_adapters(params, jax.random.key(0))
    return sum(leaf.size for leaf in jax.tree.leaves(only_adapters(params)))


def finite(values: dict[str, Any]) -> dict[str, Any]:
    """Replace infinite values by None, because JSON has no infinity."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in values.items()
    }


def _is_current(file: Path, settings: dict) -> bool:
    return file.exists() and read_json(file)["settings"] == settings


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
