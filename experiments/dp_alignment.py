"""Private preference tuning: utility against epsilon, DP-DPO and DP-ShiQ: `python -m experiments.dp_alignment`.

A short warm start on public demonstrations makes the reference, which answers further questions of the Berkeley
Function Calling Leaderboard. A right and a wrong answer to each question are private data; the question with both is
what is protected. From these DPO and ShiQ tune LoRA adapters without privacy, with clipping alone, and at several
epsilons, and each policy is measured on held-out questions. Learning rates are chosen on other, public questions.

    python -m experiments.dp_alignment                everything, an hour and a half on two cores
    python -m experiments.dp_alignment --quick        minutes: tries the script, says nothing

Every arm is a run of train.py, so whatever was stopped goes on; what an arm measured is kept in
docs/results/dp_alignment, so that finished arms cost nothing.
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
from experiments.dp_alignment_data import Sizes, read, write_pair_files, write_pairs, write_questions
from experiments.dp_alignment_measure import loss_of, measure
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
# What a method reads the same answers from.
KINDS = {"dpo": "pairs", "shiq": "answers"}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is run.

    Attributes:
        sizes: of the parts of the data.
        steps: updates of every arm, each of which takes all units.
        epsilons: of the private arms.
        delta: below 1 / units.
        rates: by method the learning rates to choose from.
        rank, targets: of the adapters.
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
    # Rates at which one update of ShiQ overshoots are not among its own.
    rates={"dpo": (1e-3, 3e-3, 1e-2), "shiq": (1e-4, 3e-4, 1e-3)},
)  # fmt: skip
QUICK = Settings(
    Sizes(units=6, demonstrations=8, tuning=4, tuning_learned=2, held_out=4, samples=3, max_tokens=32),
    steps=2, epsilons=(2.0, 8.0), delta=1e-2, rank=2, targets=("q_proj", "v_proj"),
    rates={"dpo": (1e-2,), "shiq": (1e-3,)},
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Options:
    """What to run and where."""

    repetitions: int = 1
    """Runs of every arm, which differ in the noise, or in the random numbers of the adapters where there is none."""
    quick: bool = False
    """A few questions, to try the script itself; the page goes beside the runs."""
    runs: Path = Path("runs/dp_alignment")
    """Where the runs are kept; they can be removed when the numbers are."""
    out: Path = Path("docs/results")
    """Where the page goes, and numbers that are kept."""


@dataclasses.dataclass(frozen=True)
class ClippedOnly(Privacy):
    """Clipping without noise, which protects nobody: it tells what clipping costs from what noise does."""

    def mechanism(self, trainable, **known):
        return dataclasses.replace(super().mechanism(trainable, **known), noise_multiplier=0.0)


class Arm(NamedTuple):
    """A method and its privacy: `open`, `clipped` or an epsilon."""

    method: str
    privacy: str | float

    @property
    def name(self) -> str:
        """Of its run and its file."""
        return f"{self.method}-{self.privacy if isinstance(self.privacy, str) else f'epsilon-{self.privacy:g}'}"


def arms(settings: Settings) -> list[Arm]:
    """All arms, what says most first."""
    least_first = sorted(settings.epsilons)
    middle = least_first[len(least_first) // 2]
    kinds = ["open", middle, *(epsilon for epsilon in least_first if epsilon != middle), "clipped"]
    return [Arm(method, kind) for kind in kinds for method in METHODS]


def main(options: Options) -> None:
    """Run what is missing, keep its numbers, and write the page after every arm."""
    settings = QUICK if options.quick else FULL
    runs = options.runs / ("quick" if options.quick else "full")
    out = options.runs / "page" if options.quick else options.out
    jax.config.update("jax_compilation_cache_dir", str((options.runs / "compiled").absolute()))
    Study(settings, runs, out, options.repetitions).finish()


class Study:
    """Everything that is run; each part is there already or is made."""

    def __init__(self, settings: Settings, root: Path, out: Path, repetitions: int):
        self.settings, self.root, self.out, self.repetitions = settings, root, out, repetitions
        self.kept = out / "dp_alignment"
        self.reference = root / "warm_start" / "export"

    def finish(self) -> None:
        """Make what is missing, arm by arm."""
        settings = json.loads(json.dumps(dataclasses.asdict(self.settings)))
        missing = [
            (arm, repetition)
            for repetition in range(self.repetitions)
            for arm in arms(self.settings)
            if not _is_kept(self._file(arm.name, repetition), settings)
        ]
        if missing:
            self._prepare(settings)
        for arm, repetition in missing:
            print(f"arm {arm.name}, repetition {repetition}", flush=True)
            self._keep(self._file(arm.name, repetition), settings, self._arm(arm, repetition))
            dp_alignment_page.write(self.out)
        dp_alignment_page.write(self.out)

    def _file(self, name: str, repetition: int = 0) -> Path:
        return self.kept / f"{name}-{repetition}.json"

    def _keep(self, file: Path, settings: dict, numbers: dict[str, Any]) -> None:
        self.kept.mkdir(parents=True, exist_ok=True)
        write_json(file, {"settings": settings, "date": datetime.date.today().isoformat()} | numbers)

    def _prepare(self, settings: dict) -> None:
        """The plans, the reference with what it is worth, the data, and the learning rates."""
        at = self.settings
        about = self.kept / "study.json"
        if not _is_kept(about, settings):
            found = plans(at.sizes.units, at.steps, at.epsilons, at.delta)
            self._keep(about, settings, {"plans": found, "machine": report.machine()})
        write_questions(self.root, at.sizes)
        self._run("warm_start", self._warm_start())
        if not (self.root / "private.pairs.jsonl").exists():
            write_pairs(self.root, self.reference, at.sizes)
        if not _is_kept(self.kept / "reference.json", settings):
            found = measure(self.reference, None, self.root, at.sizes)
            sampled = np.mean([row["sampled"] for row in read(self.root / "private.pairs.jsonl")])
            self._keep(self.kept / "reference.json", settings, found | {"right_answers_sampled": float(sampled)})
        if not _is_kept(self.kept / "rates.json", settings):
            self._keep(self.kept / "rates.json", settings, {method: self._tuned(method) for method in METHODS})

    def _warm_start(self) -> Job:
        return commands.Sft(
            model=str(fetch.smollm2()), data=str(self.root / "demonstrations.jsonl"), epochs=2, batch_size=4,
            optimizer=Optimizer(learning_rate=5e-5, schedule="cosine"), **self._shared("warm_start"),
        )  # fmt: skip

    def _shared(self, name: str) -> dict[str, Any]:
        return {
            "output_dir": self.root / name,
            "precision": Precision(),
            "save_every": 1 if name != "warm_start" else 100,
            # What is measured is measured apart; this only shows that the run is alive.
            "evaluation": Evaluation(
                data=str(self.root / "held_out.jsonl"), prompts=1, samples_per_prompt=1, prompts_in_flight=1,
                max_tokens=16, times=0, greedy=False,
            ),
            "reward": "bfcl",
        }  # fmt: skip

    def job(
        self, name: str, method: str, data: str, units: int, rate: float, privacy: Privacy, seed: int = 0
    ) -> Job:  # fmt: skip
        """A run that tunes adapters on all units at every step."""
        at = self.settings
        kind, loss = {
            "dpo": (commands.Dpo, PairLoss()),
            # As in experiments.bfcl; at beta 0.5 the optimum lies 2 nats between a right and a wrong answer.
            "shiq": (commands.Shiq, RewardLoss(beta=0.5, position_weight="inv_position")),
        }[method]
        return kind(
            model=str(self.reference), data=str(self.root / f"{data}.{KINDS[method]}.jsonl"),
            epochs=at.steps, batch_size=units, seed=seed, loss=loss, privacy=privacy,
            # A private run clips one unit after the other and needs no slices.
            microbatches=1 if privacy.enabled else max(units // 4, 1),
            optimizer=Optimizer(learning_rate=rate, schedule="constant", warmup=0.0),
            lora=Adapters(rank=at.rank, targets=at.targets), **self._shared(name),
        )  # fmt: skip

    def privacy(self, kind: str | float) -> Privacy:
        """The options of an arm's privacy."""
        shared = {"delta": self.settings.delta, "unit": "user", "method": "scan"}
        if kind == "open":
            return Privacy()
        if kind == "clipped":
            # Nothing is private here, so that the units' norms may be seen.
            return ClippedOnly(noise_multiplier=1.0, log_private=True, **shared)
        return Privacy(epsilon=float(kind), **shared)

    def _run(self, name: str, job: Job) -> None:
        run = RunDirectory(self.root / name)
        if not run.summary.exists():
            run_job(dataclasses.replace(job, resume=run.config.exists()))

    def _arm(self, arm: Arm, repetition: int) -> dict[str, Any]:
        name, privacy = f"{arm.name}-{repetition}", self.privacy(arm.privacy)
        rate = read_json(self.kept / "rates.json")[arm.method]["rate"]
        seed = 0 if privacy.enabled else repetition
        self._run(name, self.job(name, arm.method, "private", self.settings.sizes.units, rate, privacy, seed))
        run = RunDirectory(self.root / name)
        found = measure(run.export, self.reference, self.root, self.settings.sizes)
        updates = MetricsLog(run.metrics).rows("update")
        logged = ("grad_norm", "loss", "epsilon", "private/norm")
        # Without noise epsilon is infinite, which JSON does not know.
        learning = {key: [row[key] for row in updates if math.isfinite(row.get(key, math.inf))] for key in logged}
        accounts = read_json(run.privacy) if run.privacy.exists() else None
        return found | {
            "method": arm.method,
            "privacy": arm.privacy,
            "repetition": repetition,
            "learning_rate": rate,
            "parameters": adapter_parameters(self.reference, self.settings),
            "seconds": round(read_json(run.summary)["seconds"]),
            "updates": {key: values for key, values in learning.items() if values},
            "accounts": accounts and {key: value for key, value in finite(accounts).items() if key != "secret"},
        }

    def _tuned(self, method: str) -> dict[str, Any]:
        """The rate with the least loss on public questions, after learning from others of them without privacy."""
        sizes, losses = self.settings.sizes, {}
        pairs = read(self.root / "tuning.pairs.jsonl")
        write_pair_files(self.root, "tuning_learned", pairs[: sizes.tuning_learned])
        write_pair_files(self.root, "tuning_measured", pairs[sizes.tuning_learned :])
        for rate in self.settings.rates[method]:
            name = f"tuning-{method}-{rate:g}"
            job = self.job(name, method, "tuning_learned", sizes.tuning_learned, rate, Privacy())
            self._run(name, job)
            losses[f"{rate:g}"] = loss_of(
                job.loss.build(), method, self.root / name / "export", self.reference,
                self.root / f"tuning_measured.{KINDS[method]}.jsonl", self.root / "tuning_measured" / name,
            )  # fmt: skip
            print(f"{method} at {rate:g}: loss {losses[f'{rate:g}']:.4f} on public questions", flush=True)
        return {"rate": float(min(losses, key=losses.get)), "losses": losses}


def adapter_parameters(reference: Path, settings: Settings) -> int:
    """How many numbers the adapters have, and the noise coordinates."""
    model, params = load_hf(str(reference))
    lora = Adapters(rank=settings.rank, targets=settings.targets).build()
    params = dataclasses.replace(model, lora=lora).with_adapters(params, jax.random.key(0))
    return sum(leaf.size for leaf in jax.tree.leaves(only_adapters(params)))


def finite(values: dict[str, Any]) -> dict[str, Any]:
    """JSON has no infinity: what is infinite becomes None."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in values.items()
    }


def _is_kept(file: Path, settings: dict) -> bool:
    return file.exists() and read_json(file)["settings"] == settings


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
