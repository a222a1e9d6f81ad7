"""Compare offline methods on function calling from one buffer: `python -m experiments.bfcl`.

For each seed a supervised warm start produces the reference, which answers the training questions several times. Five
policies are evaluated on held-out questions: the reference; further supervised training on the demonstrations;
supervised training on one correct answer per question (best-of-K); DPO; and ShiQ. The last four train on the same
number of tokens. Each step is a run of train.py and resumes if interrupted; results of finished seeds are stored in
docs/results/bfcl and not recomputed.

    python -m experiments.bfcl                        small scale: two CPU cores, under an hour per seed
    python -m experiments.bfcl --scale large          for an accelerator
    python -m experiments.bfcl --quick                test the script in minutes
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

# Learning rate of all policies except the reference.
LEARNING_RATE = 1.5e-5

ARMS = ("reference", "more_sft", "best_of_k", "dpo", "shiq")


@dataclasses.dataclass(frozen=True)
class Scale:
    """Sizes of the experiment.

    Attributes:
        categories: categories of the leaderboard.
        held_out: evaluation questions, the same for every seed.
        demonstrations: questions with accepted answers for the warm start.
        prompts: training questions that the reference answers.
        samples: answers per training question.
        max_tokens: maximum answer length.
        warm_epochs: epochs of the warm start.
        epochs: epochs of ShiQ over the buffer; the other policies train on the same number of tokens.
        measured: sampled answers per held-out question, in addition to the greedy one.
        prompts_in_flight: prompts that the sampler decodes concurrently for the buffer.
        measured_in_flight: prompts that the sampler decodes concurrently for the evaluation.
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
    """Seeds, sizes and directories."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds; each has its own reference, buffer and policies."""
    scale: Literal["small", "large"] = "small"
    """Sizes of the experiment."""
    quick: bool = False
    """Test the script with a few questions; writes only below the runs directory."""
    runs: Path = Path("runs/bfcl")
    """Directory of the runs; can be deleted once the results are written."""
    out: Path = Path("docs/results")
    """Output directory of the page and the results."""


def main(options: Options) -> None:
    """Run the unfinished seeds, store their results, and write the page."""
    scale = "quick" if options.quick else options.scale
    runs = options.runs / scale
    out = runs / "page" if options.quick else options.out
    jax.config.update("jax_compilation_cache_dir", str((options.runs / "compiled").absolute()))
    for seed in options.seeds:
        Seed(SCALES[scale], seed, runs / f"seed-{seed}", out / "bfcl" / f"{scale}-{seed}.json").finish()
    bfcl_page.write(out, scale)


class Seed:
    """The runs and measurements of one seed; every step is skipped if its output exists.

    Args:
        scale: sizes of the experiment.
        seed: random seed.
        root: directory of the runs.
        results: JSON file of the results.
    """

    def __init__(self, scale: Scale, seed: int, root: Path, results: Path):
        self.scale, self.seed, self.root, self.results = scale, seed, root, results

    def finish(self) -> None:
        """Run the missing steps and write the results."""
        settings = json.loads(json.dumps(dataclasses.asdict(self.scale)))
        if self.results.exists() and json.loads(self.results.read_text())["settings"] == settings:
            return
        self.write_questions()
        for name in ("warm_start", "shiq", "dpo", "best_of_k", "more_sft"):
            self.run(name)
        arms = {name: self.measure(name) for name in ARMS}
        self.results.parent.mkdir(parents=True, exist_ok=True)
        write_json(
            self.results,
            {
                "seed": self.seed,
                "settings": settings,
                "date": datetime.date.today().isoformat(),
                "machine": report.machine(),
                "buffer": self._buffer_numbers(),
                "arms": arms,
                "jobs": {name: self.training_summary(name) for name in ("warm_start", *ARMS[1:])},
            },
        )

    def write_questions(self) -> None:
        """Write the question files; the held-out questions are the same for every seed, the training split is not."""
        rows = bfcl.load(fetch.bfcl(), self.scale.categories)
        fraction = self.scale.held_out / len(rows)
        training, held_out = bfcl.split_held_out(rows, seed=0, held_out=min(1.02 * fraction, 0.9))
        order = np.random.default_rng(self.seed).permutation(len(training))
        training = [training[index] for index in order]
        first_prompt = self.scale.demonstrations
        parts = {
            "held_out": held_out[: self.scale.held_out],
            "demonstrations": [row | {"completion": row["target"]} for row in training[:first_prompt]],
            "prompts": training[first_prompt : first_prompt + self.scale.prompts],
        }
        self.root.mkdir(parents=True, exist_ok=True)
        for name, rows in parts.items():
            write_jsonl(self.root / f"{name}.jsonl", rows)

    def job(self, name: str) -> Job:
        """Options of one run of train.py."""
        scale, reference = self.scale, str(self.root / "warm_start" / "export")
        shared = {
            "seed": self.seed,
            "output_dir": self.root / name,
            "precision": Precision(),
            "save_every": 32,
            # A minimal evaluation for monitoring; results come from `measure`.
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
                optimizer=Optimizer(learning_rate=LEARNING_RATE), **shared,
            )  # fmt: skip
        buffer = self.root / "shiq" / "buffer"
        if name == "dpo":
            return commands.Dpo(
                data=str(buffer), epochs=self._epochs(buffer, "pair"), batch_size=6,
                loss=PairLoss(), optimizer=Optimizer(learning_rate=LEARNING_RATE), **shared,
            )  # fmt: skip
        data = {"more_sft": self.root / "warm_start" / "buffer", "best_of_k": self._best_answers(buffer)}[name]
        return commands.Sft(
            data=str(data), epochs=self._epochs(data, "trajectory"), batch_size=8,
            optimizer=Optimizer(learning_rate=LEARNING_RATE), **shared,
        )  # fmt: skip

    def run(self, name: str) -> None:
        """Start or resume a run of train.py unless it is finished."""
        run = RunDirectory(self.root / name)
        if not run.summary.exists():
            run_job(dataclasses.replace(self.job(name), resume=run.config.exists()))

    def _best_answers(self, source: Path) -> Path:
        """A buffer of the first correct answer to each question that has one."""
        path = self.root / "best_answers"
        if not path.exists():
            buffer = Buffer.open(source)
            first_correct: dict[str, int] = {}
            for number, (group, value) in enumerate(zip(buffer.group_ids(), buffer.returns(), strict=True)):
                if value >= 1:
                    first_correct.setdefault(group, number)
            shutil.rmtree(partial := path.with_name(path.name + ".partial"), ignore_errors=True)
            Buffer.create(partial).append(buffer.read(list(first_correct.values())))
            partial.rename(path)
        return path

    def _epochs(self, path: Path, unit: str) -> float:
        """Epochs over a buffer that process as many tokens as ShiQ's training, with shared prompts counted once."""
        shiq_tokens = tokens_per_epoch(self.root / "shiq" / "buffer", "trajectory")
        return self.scale.epochs * shiq_tokens / tokens_per_epoch(path, unit)

    def measure(self, name: str) -> dict:
        """Evaluate a policy: rewards per held-out question, and the log-ratio to the reference of each sample."""
        path = self.root / "measured" / f"{name}.json"
        if path.exists():
            return json.loads(path.read_text())
        start = time.monotonic()
        reference = self.root / "warm_start" / "export"
        source = reference if name == "reference" else self.root / name / "export"
        rows = [json.loads(line) for line in (self.root / "held_out.jsonl").read_text().splitlines()]
        model, params = load_hf(str(source))
        tokenizer = load_tokenizer(str(source))
        evaluator = Evaluator(
            model, tokenizer, stop_tokens(tokenizer, source), rows, rewards.resolve("bfcl"), self.scale.max_tokens,
            self.scale.measured, self.scale.measured_in_flight, greedy=True,
        )  # fmt: skip
        handle = None if name == "reference" else Reference(str(reference), load_hf)
        # Common random numbers reduce the variance of differences between policies.
        result = evaluator(params, handle, jax.random.key(self.seed))
        logratios = np.zeros(len(result.records)) if result.logratios is None else result.logratios
        shape = (len(rows), self.scale.measured)
        numbers = {
            "questions": [row["id"] for row in rows],
            "sampled": np.reshape([record.rewards.sum() for record in result.records], shape).tolist(),
            "greedy": [float(record.rewards.sum()) for record in result.greedy],
            "logratio": np.reshape(logratios, shape).round(4).tolist(),
            "length": np.reshape([len(record.rewards) for record in result.records], shape).tolist(),
            "seconds": round(time.monotonic() - start),
        }
        path.parent.mkdir(exist_ok=True)
        write_jsonl(path.with_suffix(".samples.jsonl"), evaluator.generations(result, prompts=40))
        write_json(path, numbers)
        return numbers

    def training_summary(self, name: str) -> dict:
        """Cost of a run, its losses, and its loss and optimizer options."""
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


def tokens_per_epoch(path: Path, unit: str) -> int:
    """Tokens of one epoch over a buffer; prefixes shared within a pack group count once."""
    buffer = Buffer.open(path)
    total = 0
    for pack_group in pack_groups(buffer, unit):
        records = buffer.read([number for example in pack_group for number in example])
        previous: list[int] = []
        # In sorted order each sequence shares its longest prefix with its predecessor.
        for tokens in sorted(record.tokens.tolist() for record in records):
            total += len(tokens) - len(os.path.commonprefix([previous, tokens]))
            previous = tokens
    return total


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
