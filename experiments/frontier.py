"""Reward-KL frontiers of offline methods trained on the same buffer: `python -m experiments.frontier`.

On the toy task a warm-started reference answers the prompts, and every method trains on these answers at several
values of beta. Policies are evaluated on held-out prompts during training and compared at equal KL, because beta is not
comparable between methods. The learning rate of each method is chosen on a separate seed.

    python -m experiments.frontier            half an hour on two cores
    python -m experiments.frontier --quick    test the script in minutes
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import tyro

from experiments import frontier_page
from shiq_jax.models import ModelWithHeads
from shiq_jax.models.heads import HEADS
from shiq_jax.objectives import OBJECTIVES
from shiq_jax.replay import Buffer
from shiq_jax.runs import commands
from shiq_jax.runs.learning import warm_start
from shiq_jax.runs.round import Round
from shiq_jax.runs.run import set_up
from shiq_jax.runs.run_directory import RunDirectory, write_json
from shiq_jax.runs.sampling import sample_answers
from shiq_jax.training.batches import Batches, prefetch
from shiq_jax.training.evaluation import Evaluator
from shiq_jax.training.optimizers import clip_by_global_norm
from shiq_jax.training.reference import Reference
from shiq_jax.training.state import init_state
from shiq_jax.training.update import make_update

# Objective by method name.
METHODS = {"ShiQ": "shiq", "DPO": "dpo", "DRO": "dro", "CoPG": "copg", "REINFORCE": "reinforce", "best-of-K": "sft"}


@dataclasses.dataclass(frozen=True)
class Scale:
    """Sizes of the experiment.

    Attributes:
        prompts: training prompts.
        samples: answers per training prompt.
        held_out: evaluation prompts.
        betas: regularization strengths; supervised training has none.
        tuning_betas: betas for choosing the learning rate.
        rates: candidate learning rates.
        updates: update counts at which the policy is evaluated; the last one ends the run.
        batch: prompts per update.
    """

    prompts: int
    samples: int
    held_out: int
    betas: tuple[float, ...]
    tuning_betas: tuple[float, ...]
    rates: tuple[float, ...]
    updates: tuple[int, ...]
    batch: int


FULL = Scale(256, 4, 128, (0.03, 0.1, 0.3, 1.0), (0.1, 1.0), (3e-5, 1e-4, 3e-4), (8, 16, 32, 64), 32)
QUICK = Scale(32, 4, 16, (0.1, 1.0), (0.1,), (3e-4,), (1, 2), 16)


@dataclasses.dataclass(frozen=True)
class Options:
    """Seeds and directories."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds; each has its own reference and buffer."""
    tuning_seed: int = 100
    """Seed for choosing the learning rates."""
    quick: bool = False
    """Test the script with a few prompts; writes only below the runs directory."""
    runs: Path = Path("runs/frontier")
    """Directory of the references and buffers."""
    out: Path = Path("docs/results")
    """Output directory of the page."""


class Point(NamedTuple):
    """A policy and its held-out metrics."""

    beta: float
    updates: int
    kl: float
    reward: float


def main(options: Options) -> None:
    """Run the experiment and write the page."""
    scale = QUICK if options.quick else FULL
    out = options.runs / "page" if options.quick else options.out
    out.mkdir(parents=True, exist_ok=True)
    tuned = tune(Experiment(scale, options.tuning_seed, options.runs))
    seeds: dict[str, dict[str, Any]] = {}
    for seed in options.seeds:
        experiment = Experiment(scale, seed, options.runs)
        results = seeds[str(seed)] = {"reference": experiment.reference_reward}
        for method in METHODS:
            rate = tuned[method]["rate"]
            results[method] = [
                point._asdict() for beta in experiment.betas(method) for point in experiment.run(method, beta, rate)
            ]
            print(f"seed {seed}, {method}: best reward {max(point['reward'] for point in results[method]):.3f}")
    numbers = {"scale": dataclasses.asdict(scale), "tuning": tuned, "seeds": seeds}
    numbers["matched"] = frontier_page.rewards_at_equal_kl(seeds)
    write_json(out / "frontier.json", numbers)
    frontier_page.write(json.loads((out / "frontier.json").read_text()), out)


def tune(experiment: Experiment) -> dict[str, dict[str, Any]]:
    """Choose the learning rate of each method by its mean frontier height over the KL grid."""
    tuned = {}
    for method in METHODS:
        means = {}
        for rate in experiment.scale.rates:
            betas = [beta for beta in experiment.betas(method) if beta in (0.0, *experiment.scale.tuning_betas)]
            points = [point for beta in betas for point in experiment.run(method, beta, rate)]
            means[rate] = frontier_page.mean_envelope(
                [point._asdict() for point in points], experiment.reference_reward
            )
        best = max(means, key=means.get)
        tuned[method] = {"rate": best, "heights": {f"{rate:g}": height for rate, height in means.items()}}
        print(f"{method}: learning rate {best:g}")
    return tuned


class Experiment:
    """Reference, buffer and training runs of one seed."""

    def __init__(self, scale: Scale, seed: int, runs: Path):
        self.scale, self.seed = scale, seed
        self.job = self._job(runs / f"{'quick' if scale is QUICK else 'full'}-{seed}")
        path, settings = RunDirectory(self.job.output_dir), self.job.settings()
        directory = RunDirectory.begin(path.path, settings, resume=path.config.exists())
        with directory.locked():
            run = set_up(self.job, directory, settings)
            self.reference = Reference(warm_start(run), run.load)
            buffer = sample_answers(Round(run, 0, directory, self.reference, self.reference, step_offset=0))
            identity, _ = self.reference.annotate(buffer)
            self.model, self.params = self.reference.open()
            run.log.close()
        self.statistics, self.buffer = buffer.statistics(identity), buffer
        self.best_answers = _best_answers(buffer, directory.path / "best")
        self.evaluator = Evaluator(
            self.model,
            run.tokenizer,
            run.stop_tokens,
            run.task.held_out,
            run.task.reward,
            self.job.evaluation.max_tokens,
            4,
            64,
        )
        self.reference_reward = self._evaluate(self.params, 0, is_reference=True)[1]

    def betas(self, method: str) -> tuple[float, ...]:
        """Values of beta for a method; (0,) if it has no beta."""
        return self.scale.betas if "beta" in OBJECTIVES[METHODS[method]].options else (0.0,)

    def run(self, method: str, beta: float, rate: float) -> list[Point]:
        """Train one policy and evaluate it at the update counts of the scale."""
        name = METHODS[method]
        batches, update, state = self._start(name)
        points = []
        state = state._replace(opt_state=optax.tree.set(state.opt_state, learning_rate=np.float32(rate)))
        for item, _ in prefetch(batches, 0, self.scale.updates[-1]):
            state, _ = update(state, item.batch, np.float32(beta))
            step = int(state.step)
            if step in self.scale.updates:
                params = {part: leaf for part, leaf in state.params().items() if part != HEADS}
                points.append(Point(beta, step, *self._evaluate(params, step)))
        return points

    def _start(self, name: str):
        """Batches, update step and initial state of a run."""
        objective = OBJECTIVES[name]
        source = self.best_answers if name == "sft" else self.buffer
        references = {"reference": self.statistics} if "references" in objective.needs else {}
        batches = Batches(source, objective.unit, self.scale.batch, seed=self.seed, references=references)
        model, params = self.model, jax.tree.map(jax.numpy.copy, self.params)
        if objective.heads:
            model = ModelWithHeads.of(model, objective.heads)
            params = model.with_heads(params, jax.random.key(self.seed))
        return batches, _update(model, name), init_state(model, params, _optimizer())

    def _evaluate(self, params, step: int, is_reference: bool = False) -> tuple[float, float]:
        """KL to the reference and reward on held-out prompts."""
        key = jax.random.fold_in(jax.random.key(self.seed), step)
        metrics = self.evaluator(params, None if is_reference else self.reference, key).metrics
        return metrics["kl"], metrics["reward"]

    def _job(self, directory: Path) -> commands.Shiq:
        job, warm_start = commands.toy_defaults(commands.Shiq()), {}
        if self.scale is QUICK:
            warm_start = {"steps": 4, "batch_size": 8, "demonstrations": 64}
        return dataclasses.replace(
            job, seed=self.seed, output_dir=directory,
            warm_start=dataclasses.replace(job.warm_start, **warm_start),
            collection=dataclasses.replace(
                job.collection, prompts=self.scale.prompts, samples_per_prompt=self.scale.samples
            ),
            evaluation=dataclasses.replace(job.evaluation, prompts=self.scale.held_out),
        )  # fmt: skip


def _optimizer() -> optax.GradientTransformation:
    """Adam with the learning rate in its state, so that all rates share one compiled program."""
    return optax.chain(clip_by_global_norm(1.0), optax.inject_hyperparams(optax.adam)(learning_rate=0.0, b2=0.95))


@functools.cache
def _update(model, name: str):
    """Update step with beta as an argument, so that all betas share one compiled program."""

    def update(state, batch, beta):
        objective = OBJECTIVES[name]
        if "beta" in objective.options:
            objective = objective.configure(beta=beta)
        return make_update(model, objective, _optimizer(), donate=False)(state, batch)

    return jax.jit(update)


def _best_answers(buffer: Buffer, path: Path) -> Buffer:
    """A buffer of the first answer with maximal return of each group."""
    if path.exists():
        return Buffer.open(path)
    best, returns = [], buffer.returns()
    for _, members in itertools.groupby(range(len(buffer)), key=lambda number: buffer.group_ids()[number]):
        best.append(max(members, key=lambda number: (returns[number], -number)))
    result = Buffer.create(path)
    result.append([buffer[number] for number in best])
    return result


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
