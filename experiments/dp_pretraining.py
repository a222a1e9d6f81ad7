"""Public, then private pre-training at small scale (arXiv 2402.18752): `python -m experiments.dp_pretraining`.

A small decoder learns source code byte by byte: that of the standard library is public, that of installed packages
private, and other files of those packages are what it is measured on. Whatever was stopped goes on, and what has been
measured is kept in docs/results/dp_pretraining.json.

    python -m experiments.dp_pretraining            everything
    python -m experiments.dp_pretraining --quick    a few steps, most of the time compiling: tries the script
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from experiments import dp_pretraining_page, source_code
from experiments.dp_pretraining_membership import Attacks
from experiments.dp_pretraining_noise import LARGE, ImportContext, curve
from experiments.dp_pretraining_steps import single_steps
from shiq_jax.models import DecoderConfig, Model, init_params
from shiq_jax.objectives import OBJECTIVES
from shiq_jax.privacy import (
    AutoS,
    AutoV,
    ClipRule,
    DropAbove,
    FlatClip,
    Mechanism,
    improvement_metrics,
    mixing_weight,
    reset_optimizer,
)
from shiq_jax.privacy.public_to_private import Reset
from shiq_jax.privacy.secret import Secret
from shiq_jax.progress import display, track
from shiq_jax.replay import full_rows
from shiq_jax.runs import report
from shiq_jax.training.private_gradient import UnitLosses
from shiq_jax.training.state import State, init_state
from shiq_jax.training.update import make_update

OBJECTIVE, B2, DELTA = OBJECTIVES["sft"], 0.95, 1e-6
EPSILONS = (2.0, 8.0)
RATES = (1e-3, 3e-3, 1e-2)
CONFIG = DecoderConfig(
    vocab_size=256, hidden_size=64, intermediate_size=172, num_layers=2, num_heads=4, num_kv_heads=2,
    tie_word_embeddings=True,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Scale:
    """How much of everything: units of a step, steps, private units, held-out ones, steps between two measurements."""

    batch: int = 128
    steps: int = 200
    private: int = 100_000
    held_out: int = 512
    every: int = 20
    tried: int = 60
    probes: int = 8
    seeds: tuple[int, ...] = (0, 1, 2)


QUICK = Scale(batch=16, steps=12, private=2000, held_out=32, every=4, tried=2, probes=2, seeds=(0,))


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to train.

    share: of the steps that are public, or of all data where nothing is private. epsilon: of the private steps, None
    for none, infinite for clipping without noise. plain: what steps without privacy learn from. reset: what the
    change-over forgets. few: of the private data as few as are held out, again and again, in `LONGER` times the steps.
    """

    share: float
    epsilon: float | None = None
    plain: Literal["public", "private", "everything"] = "public"
    reset: Reset = "momentum"
    clip: ClipRule = AutoS()
    monitored: bool = False
    few: bool = False

    @property
    def private(self) -> bool:
        """Whether there are private steps."""
        return self.epsilon is not None


ARMS = {
    "fully public": Arm(1.0, plain="everything"),
    "only public": Arm(1.0),
    "clipped, no noise": Arm(0.0, math.inf),
}
for _epsilon in EPSILONS:
    _at = f"epsilon {_epsilon:g}"
    ARMS[f"fully private, {_at}"] = Arm(0.0, _epsilon, monitored=_epsilon == 8)
    ARMS[f"mixed 1%, {_at}"] = Arm(0.01, _epsilon)
    ARMS[f"mixed 10%, {_at}"] = Arm(0.1, _epsilon, monitored=_epsilon == 8)
RESETS = {f"mixed 10%, epsilon 8, reset {name}": Arm(0.1, 8.0, reset=name) for name in ("none", "squares", "count")}
# Each at epsilon 8 from scratch, with one seed.
RULES = {
    f"{type(rule).__name__}, R = {rule.clip_norm:g}": Arm(0.0, 8.0, clip=rule)
    for rule in (AutoV(), FlatClip(0.1), FlatClip(1.0), FlatClip(10.0), DropAbove(1.0), DropAbove(10.0))
}
ATTACKED = {
    "only public": ARMS["only public"],
    "fully private, epsilon 2": Arm(0.0, 2.0),
    "fully private, epsilon 8": Arm(0.0, 8.0),
    "not private": Arm(1.0, plain="private"),
    "few units, fully private, epsilon 8": Arm(0.0, 8.0, few=True),
    "few units, not private": Arm(1.0, plain="private", few=True),
}
# By how much the steps on few units are more than all others, and the sequences in an attack than what is held out.
LONGER, SEQUENCES = 3, 8
# Where single steps are measured: in which arm, and after which part of its steps; in the second the public ones are
# over then. Their batches are parts of that of the experiment.
POINTS = {"fully private, epsilon 8": 0.5, "mixed 10%, epsilon 8": 0.1}
BATCHES = (1 / 32, 1 / 8, 1 / 2, 2, 8)


@dataclasses.dataclass(frozen=True)
class Options:
    """What to run."""

    quick: bool = False
    """A few steps; the numbers go to runs/dp_pretraining."""
    json: Path = Path("docs/results/dp_pretraining.json")
    """Where the numbers are kept; the page and the figures go beside it."""


@display()
def main(options: Options) -> None:
    """Run what is missing, keep its numbers, draw the page."""
    scale = QUICK if options.quick else Scale()
    path = Path("runs/dp_pretraining/quick.json") if options.quick else options.json
    path.parent.mkdir(parents=True, exist_ok=True)
    found = json.loads(path.read_text()) if path.exists() and not options.quick else {}
    settings = json.loads(json.dumps(dataclasses.asdict(scale)))
    if found.get("settings") != settings:
        found = {"settings": settings, "arms": {}}
    experiment = Experiment(scale)

    def keep() -> None:
        found.update(device=report.machine(), parameters=experiment.parameters)
        path.write_text(json.dumps(found, indent=1) + "\n")

    if "rates" not in found:
        found["rates"] = experiment.tuned()
        keep()
    for seed in scale.seeds:
        for name, arm in (ARMS | RESETS).items():
            place = found["arms"].setdefault(name, {})
            if str(seed) not in place:
                place[str(seed)] = experiment.run(name, arm, seed, found["rates"])
                keep()
    seed, rates = scale.seeds[0], found["rates"]
    attacks = Attacks(experiment, rates, ARMS["only public"], SEQUENCES)
    parts: dict[str, dict[str, Callable[[], Any]]] = {
        "noise": {name: partial(curve, reading, EPSILONS) for name, reading in readings(scale).items()},
        "attacks": {name: partial(attacks.measure, name, arm, seed) for name, arm in ATTACKED.items()},
        "rules": {name: partial(experiment.run, name, arm, seed, rates) for name, arm in RULES.items()},
        "single_steps": {
            name: partial(single_steps, experiment, name, ARMS[name], rates, at, BATCHES, B2)
            for name, at in POINTS.items()
        },
    }
    for part, each in parts.items():
        place = found.setdefault(part, {})
        for name, measure in each.items():
            if name not in place:
                place[name] = measure()
                keep()
    dp_pretraining_page.write(found, path.with_suffix(".md"))


def readings(scale: Scale) -> dict[str, ImportContext]:
    """What noise is asked for, by batch: the experiment's own data, in sixteen steps at least, and many more."""
    read = scale.batch * scale.steps
    batches = tuple(2**power for power in range(scale.batch.bit_length() - 4, (read // 16).bit_length()))
    here = ImportContext(scale.private, read / scale.private, DELTA, batches)
    return {"here": here} if scale == QUICK else {"here": here, "large": LARGE}


class Plan(NamedTuple):
    """All steps of an arm, the first private one, what makes them private, and what plain and private steps read."""

    steps: int
    first: int
    mechanism: Mechanism | None
    plain: np.ndarray
    private: np.ndarray


class Experiment:
    """Data, model and compiled steps, which all arms share."""

    def __init__(self, scale: Scale):
        self.scale = scale
        # As many public sequences as the public steps of the largest share read once.
        self.pool = round(max(arm.share for arm in ARMS.values() if arm.private) * scale.steps) * scale.batch
        self.text = source_code.load(self.pool, scale.private, scale.held_out)
        self.model = Model.from_config(CONFIG)
        self.parameters = sum(leaf.size for leaf in jax.tree.leaves(self.model.abstract_params()))
        self.losses = UnitLosses(self.model, OBJECTIVE, {}, {})
        self._measure = jax.jit(lambda params, batch: jnp.mean(self.losses(params, batch, None)))
        self._each = jax.jit(lambda params, batch: self.losses(params, batch, None))
        self._looked = jax.jit(self._look, static_argnames=("mechanism", "probes"))

    def tuned(self) -> dict[str, Any]:
        """Learning rates, chosen by public held-out loss: of plain steps, and of private ones that public data stand
        in for."""
        tried: dict[str, dict[str, float]] = {"plain": {}, "private": {}}
        stand_in = dataclasses.replace(self.mechanism(8.0, self.scale.tried), dataset_size=self.pool)
        for rate in RATES:
            for kind, mechanism in (("plain", None), ("private", stand_in)):
                state, update = self._begin(0, rate, mechanism)
                draw = self._draw(self.text.public, mechanism, 0)
                for step in range(self.scale.tried):
                    state = update(state, draw(step), step)
                tried[kind][f"{rate:g}"] = self.held_out(state, self.text.public_held_out)
        return {kind: float(min(losses, key=losses.get)) for kind, losses in tried.items()} | {"tried": tried}

    def mechanism(self, epsilon: float, steps: int, clip: ClipRule = AutoS(), units: int | None = None) -> Mechanism:
        """Of so many private steps on so many units, by default all."""
        if epsilon == math.inf:
            return dataclasses.replace(self.mechanism(max(EPSILONS), steps, clip, units), noise_multiplier=0.0)
        return Mechanism.calibrated(
            epsilon=epsilon, delta=DELTA, dataset_size=units or self.scale.private, expected_batch=self.scale.batch,
            steps=steps, clip=clip,
        )  # fmt: skip

    def plan(self, arm: Arm) -> Plan:
        """What an arm does when, and what it reads."""
        steps = self.scale.steps * (LONGER if arm.few else 1)
        first = sum(mixing_weight("switch", step, steps, arm.share) == 1 for step in range(steps))
        public, private = self.text.public, self.text.private
        if arm.few:
            private = private[:: len(private) // self.scale.held_out][: self.scale.held_out]
        plain = {"public": [public], "private": [private], "everything": [public, private]}[arm.plain]
        mechanism = self.mechanism(arm.epsilon, steps - first, arm.clip, len(private)) if arm.private else None
        return Plan(steps, first, mechanism, np.concatenate(plain), private)

    def states(self, name: str, arm: Arm, plan: Plan, seed: int, rates: dict) -> Iterator[tuple[int, State]]:
        """Train an arm: its state before every step and after the last; to go on takes the memory of the one before."""
        steps, first, mechanism = plan.steps, plan.first, plan.mechanism
        state, public = self._begin(seed, rates["plain"], None)
        draw = self._draw(plan.plain, None, seed)
        private = self._begin(seed, rates["private"], mechanism)[1] if mechanism else None
        drawn = self._draw(plan.private, mechanism, seed) if mechanism else None
        for step in track(range(steps), f"{name}, seed {seed}", steps, "steps"):
            yield step, state
            if step < first:
                state = public(state, draw(step), step)
                continue
            if step == first:
                state = state._replace(opt_state=reset_optimizer(state.opt_state, arm.reset))
            state = private(state, drawn(step), step)
        yield steps, state

    def run(self, name: str, arm: Arm, seed: int, rates: dict) -> dict[str, Any]:
        """Train an arm: losses on held-out private data by step, the switch, noise, and what was monitored."""
        scale, began = self.scale, time.monotonic()
        plan = self.plan(arm)
        mechanism, losses, seen = plan.mechanism, [], []
        for step, state in self.states(name, arm, plan, seed, rates):
            if step % scale.every == 0 or step == plan.steps:
                losses.append([step, self.held_out(state, self.text.private_held_out)])
                if arm.monitored and seed == scale.seeds[0] and step < plan.steps:
                    seen.append([step, self.look(state, mechanism, seed)])
        return {
            "losses": losses, "switch": plan.first, "monitor": seen,
            "seconds": round(time.monotonic() - began, 1),
            "noise_multiplier": mechanism and mechanism.noise_multiplier,
            # JSON has no infinity.
            "epsilon": mechanism.epsilon() if arm.private and arm.epsilon < math.inf else None,
        }  # fmt: skip

    def held_out(self, state: State, tokens: np.ndarray) -> float:
        """Mean loss in nats per byte."""
        return self.loss(state.trainable, tokens)

    def loss(self, params: Any, tokens: np.ndarray) -> float:
        """The same, of parameters."""
        return float(self._measure(params, full_rows(tokens)))

    def each(self, params: Any, tokens: np.ndarray) -> np.ndarray:
        """Losses of sequences, in nats per byte."""
        parts = np.array_split(tokens, max(len(tokens) // self.scale.held_out, 1))
        return np.concatenate([self._each(params, full_rows(part)) for part in parts])

    def look(
        self, state: State, mechanism: Mechanism, seed: int, units: int = 64, probes: int | None = None
    ) -> dict[str, float]:
        """What a private step could gain here, of eight public batches alone, in the metric of Adam."""
        tokens = self.text.public[: 8 * units].reshape(8, -1, source_code.LENGTH)
        batches = jax.tree.map(lambda *leaves: np.stack(leaves), *map(full_rows, tokens))
        found = self._looked(state, batches, jax.random.key(seed), mechanism, probes or self.scale.probes)
        return {name: float(value) for name, value in found.items()}

    def _look(self, state: State, batches, key, mechanism: Mechanism, probes: int):
        about = dict(mechanism=mechanism, b2=B2, probes=probes)
        return improvement_metrics(self.losses, state.trainable, state.opt_state, batches, key, **about)

    def _begin(self, seed: int, rate: float, mechanism: Mechanism | None) -> tuple[State, Callable]:
        rule = optax.adamw(rate, b2=B2, weight_decay=0.0)
        params = init_params(self.model, jax.random.key(seed))
        state = init_state(self.model, params, rule)
        # Of all methods the quickest for a model of this size.
        update = make_update(self.model, OBJECTIVE, rule, privacy=mechanism, method="scan")
        key = {} if mechanism is None else {"private_key": Secret.insecure(seed).noise}

        def step(state: State, batch, number: int) -> State:
            # The noise is a function of the step, which the public phase has counted as well.
            return update(state, batch, **key)[0]

        return state, step

    def _draw(self, tokens: np.ndarray, mechanism: Mechanism | None, seed: int) -> Callable[[int], Any]:
        """Batches by step: Poisson samples of a mechanism, or shuffled passes."""
        if mechanism is not None:
            sampling = Secret.insecure(seed).sampling

            def sample(step: int):
                chosen, real = mechanism.sample(sampling, step)
                return full_rows(tokens[chosen])._replace(real=real[:, None])

            return sample
        numbers = self.numbers(len(tokens), None, seed)
        return lambda step: full_rows(tokens[numbers(step)])

    def numbers(self, count: int, mechanism: Mechanism | None, seed: int) -> Callable[[int], np.ndarray]:
        """Which units are drawn, by step; of shuffled passes one step after the other."""
        if mechanism is not None:
            sampling = Secret.insecure(seed).sampling

            def sampled(step: int):
                chosen, real = mechanism.sample(sampling, step)
                return chosen[real]

            return sampled
        order, size = self._passes(count, seed), self.scale.batch
        stream: list[int] = []

        def shuffled(step: int):
            while len(stream) < size:
                stream.extend(next(order))
            return np.array([stream.pop() for _ in range(size)])

        return shuffled

    @staticmethod
    def _passes(count: int, seed: int) -> Iterator[list[int]]:
        rng = np.random.default_rng(seed)
        while True:
            yield rng.permutation(count).tolist()


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
