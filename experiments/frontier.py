"""How much reward for how much KL, method by method, from one buffer: `python -m experiments.frontier`.

The embedded task. Per seed a warm-started reference answers prompts, and every method learns from these same answers,
at several strengths of its regularisation; along each run the policy is evaluated on held-out prompts. Strengths are
not comparable between methods, distances are: what is reported is the reward at equal KL. Learning rates are chosen per
method on a seed of their own.

    python -m experiments.frontier            half an hour on two cores
    python -m experiments.frontier --quick    minutes: tries the script, says nothing
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

# By the name on the page: the objective.
METHODS = {"ShiQ": "shiq", "DPO": "dpo", "DRO": "dro", "CoPG": "copg", "REINFORCE": "reinforce", "best-of-K": "sft"}


@dataclasses.dataclass(frozen=True)
class Scale:
    """How much of everything.

    Attributes:
        prompts: that the reference answers.
        samples: answers to each.
        held_out: prompts to evaluate on.
        betas: strengths of the regularisation; supervised training has none.
        tuning_betas: those of them at which learning rates are chosen.
        rates: learning rates to choose from.
        updates: after which the policy is evaluated; the last number is the length of a run.
        batch: prompts of an update, each with its answers, its best and worst, or its best.
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
    """What to run and where."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """One reference, buffer and set of runs each."""
    tuning_seed: int = 100
    """On which the learning rates are chosen."""
    quick: bool = False
    """A few prompts, to try the script itself; the page goes beside the runs."""
    runs: Path = Path("runs/frontier")
    """Where references and buffers are kept."""
    out: Path = Path("docs/results")
    """Where the page goes."""


class Point(NamedTuple):
    """A policy: how it was made, and what it is worth on held-out prompts."""

    beta: float
    updates: int
    kl: float
    reward: float


def main(options: Options) -> None:
    """Run everything and write the page."""
    scale = QUICK if options.quick else FULL
    out = options.runs / "page" if options.quick else options.out
    out.mkdir(parents=True, exist_ok=True)
    tuned = tuning(Lab(scale, options.tuning_seed, options.runs))
    found = {}
    for seed in options.seeds:
        lab = Lab(scale, seed, options.runs)
        found[seed] = {"reference": lab.reference_reward}
        for method in METHODS:
            rate = tuned[method]["rate"]
            found[seed][method] = [
                point._asdict() for beta in lab.betas(method) for point in lab.run(method, beta, rate)
            ]
            print(f"seed {seed}, {method}: best reward {max(point['reward'] for point in found[seed][method]):.3f}")
    numbers = {
        "scale": dataclasses.asdict(scale),
        "tuning": tuned,
        "seeds": {str(key): each for key, each in found.items()},
    }
    numbers |= {"matched": frontier_page.matched(numbers["seeds"])}
    write_json(out / "frontier.json", numbers)
    frontier_page.write(json.loads((out / "frontier.json").read_text()), out)


def tuning(lab: Lab) -> dict[str, dict[str, Any]]:
    """For every method the rate with the most reward, in the mean over a grid of distances; and all rates' means."""
    found = {}
    for method in METHODS:
        means = {}
        for rate in lab.scale.rates:
            betas = [beta for beta in lab.betas(method) if beta in (0.0, *lab.scale.tuning_betas)]
            points = [point for beta in betas for point in lab.run(method, beta, rate)]
            means[rate] = frontier_page.mean_height([point._asdict() for point in points], lab.reference_reward)
        best = max(means, key=means.get)
        found[method] = {"rate": best, "heights": {f"{rate:g}": height for rate, height in means.items()}}
        print(f"{method}: learning rate {best:g}")
    return found


class Lab:
    """A seed's reference and buffer, and runs that begin from there."""

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
        self.best = _best_of_each(buffer, directory.path / "best")
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
        self.reference_reward = self._evaluate(self.params, 0, itself=True)[1]

    def betas(self, method: str) -> tuple[float, ...]:
        """The strengths to run a method at."""
        return self.scale.betas if "beta" in OBJECTIVES[METHODS[method]].options else (0.0,)

    def run(self, method: str, beta: float, rate: float) -> list[Point]:
        """The policies of one run."""
        name = METHODS[method]
        batches, update, state = self._begin(name)
        strength, points = np.float32(beta), []
        state = state._replace(opt_state=optax.tree.set(state.opt_state, learning_rate=np.float32(rate)))
        for item, _ in prefetch(batches, 0, self.scale.updates[-1]):
            state, _ = update(state, item.batch, strength)
            done = int(state.step)
            if done in self.scale.updates:
                weights = {part: leaf for part, leaf in state.params().items() if part != HEADS}
                points.append(Point(beta, done, *self._evaluate(weights, done)))
        return points

    def _begin(self, name: str):
        objective = OBJECTIVES[name]
        source = self.best if name == "sft" else self.buffer
        references = {"reference": self.statistics} if "references" in objective.needs else {}
        batches = Batches(source, objective.unit, self.scale.batch, seed=self.seed, references=references)
        model, params = self.model, jax.tree.map(jax.numpy.copy, self.params)
        if objective.heads:
            model = ModelWithHeads.of(model, objective.heads)
            params = model.with_heads(params, jax.random.key(self.seed))
        return batches, _update(model, name), init_state(model, params, _rule())

    def _evaluate(self, params, step: int, itself: bool = False) -> tuple[float, float]:
        key = jax.random.fold_in(jax.random.key(self.seed), step)
        numbers = self.evaluator(params, None if itself else self.reference, key).metrics
        return numbers["kl"], numbers["reward"]

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


def _rule() -> optax.GradientTransformation:
    """Adam at a rate that is part of the state, so that one program serves all rates."""
    return optax.chain(clip_by_global_norm(1.0), optax.inject_hyperparams(optax.adam)(learning_rate=0.0, b2=0.95))


@functools.cache
def _update(model, name: str):
    """An update at a strength that is an argument, so that one program serves all of them."""

    def update(state, batch, beta):
        objective = OBJECTIVES[name]
        if "beta" in objective.options:
            objective = objective.configure(beta=beta)
        return make_update(model, objective, _rule(), donate=False)(state, batch)

    return jax.jit(update)


def _best_of_each(buffer: Buffer, path: Path) -> Buffer:
    """A buffer of the best answer of each group, the first of equals."""
    if path.exists():
        return Buffer.open(path)
    chosen, returns = [], buffer.returns()
    for _, members in itertools.groupby(range(len(buffer)), key=lambda number: buffer.group_ids()[number]):
        chosen.append(max(members, key=lambda number: (returns[number], -number)))
    best = Buffer.create(path)
    best.append([buffer[number] for number in chosen])
    return best


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
