"""What wins on function calling from one buffer: `python -m experiments.bfcl`.

Per seed: a supervised warm start makes the reference, the reference answers training questions several times, and from
there five policies are measured on held-out questions: the reference itself; more supervised training on the warm
start's demonstrations; supervised training on the best answer of each question; DPO; ShiQ. The last four read as many
tokens in their updates as one another. Every step is a run of train.py, so whatever was stopped goes on, and what a
seed measured is kept in docs/results/bfcl, so that finished seeds cost nothing.

    python -m experiments.bfcl                        small: two CPU cores, under an hour per seed
    python -m experiments.bfcl --scale large          for an accelerator
    python -m experiments.bfcl --quick                minutes: tries the script, says nothing
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import shutil
import time
from pathlib import Path
from typing import Literal

import jax
import numpy as np
import tyro

from experiments import bfcl_page
from shiq_jax.data.chat import load_tokenizer, stop_tokens
from shiq_jax.models import load_hf
from shiq_jax.replay import Buffer, pack_groups
from shiq_jax.rollout.sampling import Sampling
from shiq_jax.runs import commands, report
from shiq_jax.runs.loss_options import PairLoss, RewardLoss
from shiq_jax.runs.metrics import MetricsLog
from shiq_jax.runs.options import Collection, Evaluation, Job, Precision
from shiq_jax.runs.pipeline import train as run_job
from shiq_jax.runs.run_directory import RunDirectory, write_json, write_jsonl
from shiq_jax.tasks import bfcl, fetch, rewards
from shiq_jax.training.evaluation import Evaluator
from shiq_jax.training.optimizers import Optimizer
from shiq_jax.training.reference import Reference

# Of every policy but the reference.
RATE = 1.5e-5

ARMS = ("reference", "more_sft", "best_of_k", "dpo", "shiq")


@dataclasses.dataclass(frozen=True)
class Scale:
    """How much of everything.

    Attributes:
        categories: of the leaderboard.
        held_out: questions to measure on, the same for every seed.
        demonstrations: questions whose accepted answer is shown in the warm start.
        prompts: other questions, which the reference answers.
        samples: answers to each.
        max_tokens: longest answer.
        warm_epochs: passes over the demonstrations.
        epochs: passes of ShiQ over the buffer; the other policies read as many tokens.
        measured: fresh answers per held-out question, besides the greedy one.
        prompts_in_flight: questions that the sampler works on at once, for the buffer.
        measured_in_flight: the same for what is measured.
    """

    categories: tuple[str, ...]
    held_out: int
    demonstrations: int
    prompts: int
    samples: int
    max_tokens: int
    warm_epochs: float
    epochs: float
    measured: int
    prompts_in_flight: int
    measured_in_flight: int


SCALES = {
    "small": Scale(
        categories=("simple_python",), held_out=200, demonstrations=60, prompts=96, samples=8, max_tokens=64,
        warm_epochs=2, epochs=1, measured=2, prompts_in_flight=32, measured_in_flight=64,
    ),
    "large": Scale(
        categories=bfcl.CATEGORIES, held_out=200, demonstrations=160, prompts=600, samples=16, max_tokens=192,
        warm_epochs=2, epochs=3, measured=8, prompts_in_flight=64, measured_in_flight=100,
    ),
    "quick": Scale(
        categories=("simple_python",), held_out=8, demonstrations=40, prompts=12, samples=6, max_tokens=40,
        warm_epochs=2, epochs=1, measured=1, prompts_in_flight=12, measured_in_flight=8,
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Options:
    """What to run and where."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """One reference, buffer and set of policies each."""
    scale: Literal["small", "large"] = "small"
    """How much of everything."""
    quick: bool = False
    """A few questions, to try the script itself; the page goes beside the runs."""
    runs: Path = Path("runs/bfcl")
    """Where the runs are kept; they can be removed when the numbers are."""
    out: Path = Path("docs/results")
    """Where the page goes, and numbers that are kept."""


def main(options: Options) -> None:
    """Run what is missing, keep its numbers, and write the page."""
    scale = "quick" if options.quick else options.scale
    runs = options.runs / scale
    out = runs / "page" if options.quick else options.out
    jax.config.update("jax_compilation_cache_dir", str((options.runs / "compiled").absolute()))
    for seed in options.seeds:
        Seed(SCALES[scale], seed, runs / f"seed-{seed}", out / "bfcl" / f"{scale}-{seed}.json").finish()
    bfcl_page.write(out, scale)


class Seed:
    """Everything that is done with one seed; each part is there already or is made."""

    def __init__(self, scale: Scale, seed: int, root: Path, kept: Path):
        self.scale, self.seed, self.root, self.kept = scale, seed, root, kept

    def finish(self) -> None:
        """Make what is missing of this seed, and keep its numbers."""
        settings = json.loads(json.dumps(dataclasses.asdict(self.scale)))
        if self.kept.exists() and json.loads(self.kept.read_text())["settings"] == settings:
            return
        self._write_questions()
        for name in ("warm_start", "shiq", "dpo", "best_of_k", "more_sft"):
            self._run(name)
        found = {name: self._measure(name) for name in ARMS}
        self.kept.parent.mkdir(parents=True, exist_ok=True)
        write_json(
            self.kept,
            {
                "seed": self.seed,
                "settings": settings,
                "date": datetime.date.today().isoformat(),
                "machine": report.machine(),
                "buffer": self._buffer_numbers(),
                "arms": found,
                "jobs": {name: self._learning(name) for name in ("warm_start", *ARMS[1:])},
            },
        )

    def _write_questions(self) -> None:
        """Held-out questions are the same for every seed; which of the others are demonstrated is not."""
        rows = bfcl.load(fetch.bfcl(), self.scale.categories)
        share = self.scale.held_out / len(rows)
        training, held_out = bfcl.split_held_out(rows, seed=0, held_out=min(1.02 * share, 0.9))
        order = np.random.default_rng(self.seed).permutation(len(training))
        training = [training[index] for index in order]
        shown, asked = self.scale.demonstrations, self.scale.prompts
        parts = {
            "held_out": held_out[: self.scale.held_out],
            "demonstrations": [row | {"completion": row["target"]} for row in training[:shown]],
            "prompts": training[shown : shown + asked],
        }
        self.root.mkdir(parents=True, exist_ok=True)
        for name, rows in parts.items():
            write_jsonl(self.root / f"{name}.jsonl", rows)

    def job(self, name: str) -> Job:
        """One run of train.py."""
        scale, reference = self.scale, str(self.root / "warm_start" / "export")
        shared = {
            "seed": self.seed,
            "output_dir": self.root / name,
            "precision": Precision(),
            "save_every": 32,
            # What is measured is measured by `_measure`; this one only shows that the run is alive.
            "evaluation": Evaluation(
                data=str(self.root / "held_out.jsonl"), prompts=4, samples_per_prompt=1, prompts_in_flight=4,
                max_tokens=scale.max_tokens, times=0, greedy=False,
            ),
            "reward": "bfcl",
        }  # fmt: skip
        demonstrations = str(self.root / "demonstrations.jsonl")
        if name == "warm_start":
            return commands.Sft(
                model=str(fetch.smollm2()), data=demonstrations, epochs=scale.warm_epochs, batch_size=4,
                optimizer=Optimizer(learning_rate=5e-5, schedule="cosine"), **shared,
            )  # fmt: skip
        shared["model"] = reference
        if name == "shiq":
            return commands.Shiq(
                prompts=str(self.root / "prompts.jsonl"), baseline="group_mean", epochs=scale.epochs, batch_size=4,
                collection=Collection(
                    prompts=scale.prompts, samples_per_prompt=scale.samples,
                    prompts_per_batch=scale.prompts, prompts_in_flight=scale.prompts_in_flight,
                    sampling=Sampling(max_tokens=scale.max_tokens),
                ),
                loss=RewardLoss(beta=0.5, position_weight="inv_position"),
                optimizer=Optimizer(learning_rate=RATE), **shared,
            )  # fmt: skip
        buffer = self.root / "shiq" / "buffer"
        if name == "dpo":
            return commands.Dpo(
                data=str(buffer), epochs=self._epochs(buffer, "pair"), batch_size=6,
                loss=PairLoss(), optimizer=Optimizer(learning_rate=RATE), **shared,
            )  # fmt: skip
        data = {"more_sft": self.root / "warm_start" / "buffer", "best_of_k": self._best(buffer)}[name]
        return commands.Sft(
            data=str(data), epochs=self._epochs(data, "trajectory"), batch_size=8,
            optimizer=Optimizer(learning_rate=RATE), **shared,
        )  # fmt: skip

    def _run(self, name: str) -> None:
        run = RunDirectory(self.root / name)
        if not run.summary.exists():
            run_job(dataclasses.replace(self.job(name), resume=run.config.exists()))

    def _best(self, buffer: Path) -> Path:
        """A buffer of the first right answer to each question that has one."""
        path = self.root / "best_answers"
        if not path.exists():
            everything = Buffer.open(buffer)
            chosen: dict[str, int] = {}
            for number, (group, value) in enumerate(zip(everything.group_ids(), everything.returns(), strict=True)):
                if value >= 1:
                    chosen.setdefault(group, number)
            shutil.rmtree(partial := path.with_name(path.name + ".partial"), ignore_errors=True)
            Buffer.create(partial).append(everything.read(list(chosen.values())))
            partial.rename(path)
        return path

    def _epochs(self, path: Path, unit: str) -> float:
        """How many passes over a buffer read as many tokens as ShiQ's passes, shared prompts counted once."""
        return self.scale.epochs * _tokens(self.root / "shiq" / "buffer", "trajectory") / _tokens(path, unit)

    def _measure(self, name: str) -> dict:
        """Right or wrong per held-out question, and the log-ratio to the reference of every fresh answer."""
        path = self.root / "measured" / f"{name}.json"
        if path.exists():
            return json.loads(path.read_text())
        began = time.monotonic()
        reference = self.root / "warm_start" / "export"
        source = reference if name == "reference" else self.root / name / "export"
        rows = [json.loads(line) for line in (self.root / "held_out.jsonl").read_text().splitlines()]
        model, params = load_hf(str(source))
        tokenizer = load_tokenizer(str(source))
        evaluator = Evaluator(
            model, tokenizer, stop_tokens(tokenizer, source), rows, rewards.resolve("bfcl"), self.scale.max_tokens,
            self.scale.measured, self.scale.measured_in_flight, greedy=True,
        )  # fmt: skip
        held = None if name == "reference" else Reference(str(reference), load_hf)
        # The same random numbers for every policy: differences then vary less.
        found = evaluator(params, held, jax.random.key(self.seed))
        logratios = np.zeros(len(found.records)) if found.logratios is None else found.logratios
        shape = (len(rows), self.scale.measured)
        numbers = {
            "questions": [row["id"] for row in rows],
            "sampled": np.reshape([record.rewards.sum() for record in found.records], shape).tolist(),
            "greedy": [float(record.rewards.sum()) for record in found.greedy],
            "logratio": np.reshape(logratios, shape).round(4).tolist(),
            "length": np.reshape([len(record.rewards) for record in found.records], shape).tolist(),
            "seconds": round(time.monotonic() - began),
        }
        path.parent.mkdir(exist_ok=True)
        write_jsonl(path.with_suffix(".samples.jsonl"), evaluator.generations(found, prompts=40))
        write_json(path, numbers)
        return numbers

    def _learning(self, name: str) -> dict:
        """What a run cost, and the options of its loss and optimiser."""
        run = RunDirectory(self.root / name)
        summary, config = (json.loads(file.read_text()) for file in (run.summary, run.config))
        updates = MetricsLog(run.metrics).rows("update")
        return {
            "updates": len(updates),
            "epochs": round(config["epochs"], 3),
            "batch_size": config["batch_size"],
            "loss": config["loss"],
            "learning_rate": config["optimizer"]["learning_rate"],
            "tokens": sum(row["tokens"] for row in updates),
            "seconds": round(summary["seconds"]),
            "losses": [round(row["loss"], 5) for row in updates],
        }

    def _buffer_numbers(self) -> dict:
        buffer = Buffer.open(self.root / "shiq" / "buffer")
        groups = {}
        for group, value in zip(buffer.group_ids(), buffer.returns(), strict=True):
            groups.setdefault(group, []).append(value)
        return {
            "records": len(buffer),
            "accuracy": float(np.mean(buffer.returns() >= 1)),
            "with_a_right_answer": sum(bool(max(values) >= 1) for values in groups.values()),
            "with_both": sum(bool(max(values) > min(values)) for values in groups.values()),
        }


def _tokens(path: Path, unit: str) -> int:
    """Tokens of one pass over a buffer, what the sequences of a pack_group share at their beginning counted once."""
    buffer = Buffer.open(path)
    total = 0
    for pack_group in pack_groups(buffer, unit):
        members = buffer.read([number for example in pack_group for number in example])
        before: list[int] = []
        # In order, each sequence shares most with the one before it.
        for tokens in sorted(record.tokens.tolist() for record in members):
            total += len(tokens) - len(os.path.commonprefix([before, tokens]))
            before = tokens
    return total


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
