"""Public-to-private pretraining at small scale (arXiv 2402.18752): `python -m experiments.dp_pretraining`.

A small byte-level decoder is trained on source code. The standard library is public data, installed packages are
private data, and held-out files of those packages measure the loss. Finished measurements are stored in
docs/results/dp_pretraining.json and not repeated.

    python -m experiments.dp_pretraining            full experiment
    python -m experiments.dp_pretraining --quick    test the script with a few steps
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
from experiments.dp_pretraining_noise import LARGE_RUN, AccountingRun, curve
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
    """Sizes of the experiment.

    Attributes:
        batch: expected units per step.
        steps: steps per arm.
        private: private units.
        held_out: held-out sequences.
        every: steps between measurements.
        tried: steps per trial of a learning rate.
        probes: probe vectors of the trace estimate.
        seeds: seeds of the arms.
    """

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
    """One training configuration.

    Attributes:
        public_share: fraction of the steps that are public; 1 if no step is private.
        epsilon: epsilon of the private steps; None without private steps, infinity for clipping without noise.
        nonprivate: data of the non-private steps.
        reset: optimizer state that is reset at the switch to private data.
        clip: clip rule of the private steps.
        monitored: record the loss-improvement diagnostics.
        few_units: train on only `held_out` private units, for `FEW_UNITS_FACTOR` times as many steps.
    """

    public_share: float
    epsilon: float | None = None
    nonprivate: Literal["public", "private", "everything"] = "public"
    reset: Reset = "momentum"
    clip: ClipRule = AutoS()
    monitored: bool = False
    few_units: bool = False

    @property
    def private(self) -> bool:
        """Whether there are private steps."""
        return self.epsilon is not None


ARMS = {
    "fully public": Arm(1.0, nonprivate="everything"),
    "only public": Arm(1.0),
    "clipped, no noise": Arm(0.0, math.inf),
}
for _epsilon in EPSILONS:
    _at = f"epsilon {_epsilon:g}"
    ARMS[f"fully private, {_at}"] = Arm(0.0, _epsilon, monitored=_epsilon == 8)
    ARMS[f"mixed 1%, {_at}"] = Arm(0.01, _epsilon)
    ARMS[f"mixed 10%, {_at}"] = Arm(0.1, _epsilon, monitored=_epsilon == 8)
RESETS = {f"mixed 10%, epsilon 8, reset {name}": Arm(0.1, 8.0, reset=name) for name in ("none", "squares", "count")}
# Clip rules at epsilon 8 from scratch, with one seed; keys of the JSON results.
RULES = {
    f"{name}, R = {rule.clip_norm:g}": Arm(0.0, 8.0, clip=rule)
    for name, rule in (
        ("AutoV", AutoV()), ("Abadi", FlatClip(0.1)), ("Abadi", FlatClip(1.0)), ("Abadi", FlatClip(10.0)),
        ("Global", DropAbove(1.0)), ("Global", DropAbove(10.0)),
    )
}  # fmt: skip
ATTACK_ARMS = {
    "only public": ARMS["only public"],
    "fully private, epsilon 2": Arm(0.0, 2.0),
    "fully private, epsilon 8": Arm(0.0, 8.0),
    "not private": Arm(1.0, nonprivate="private"),
    "few units, fully private, epsilon 8": Arm(0.0, 8.0, few_units=True),
    "few units, not private": Arm(1.0, nonprivate="private", few_units=True),
}
# Factor on the steps of the few-units arms, and on `held_out` for the number of sequences in an attack.
FEW_UNITS_FACTOR, ATTACK_FACTOR = 3, 8
# Arms in which single steps are measured, and the fraction of the steps before it; 0.1 is the end of the public phase.
SINGLE_STEP_POINTS = {"fully private, epsilon 8": 0.5, "mixed 10%, epsilon 8": 0.1}
# Batch sizes of the single steps, relative to that of the experiment.
SINGLE_STEP_BATCHES = (1 / 32, 1 / 8, 1 / 2, 2, 8)


@dataclasses.dataclass(frozen=True)
class Options:
    """Scale and output file."""

    quick: bool = False
    """Test the script with a few steps; writes to runs/dp_pretraining."""
    json: Path = Path("docs/results/dp_pretraining.json")
    """Results file; the page and the figures are written to the same directory."""


@display()
def main(options: Options) -> None:
    """Run the missing measurements, store the results, and write the page."""
    scale = QUICK if options.quick else Scale()
    path = Path("runs/dp_pretraining/quick.json") if options.quick else options.json
    path.parent.mkdir(parents=True, exist_ok=True)
    results = json.loads(path.read_text()) if path.exists() and not options.quick else {}
    settings = json.loads(json.dumps(dataclasses.asdict(scale)))
    if results.get("settings") != settings:
        results = {"settings": settings, "arms": {}}
    experiment = Experiment(scale)

    def save() -> None:
        results.update(device=report.machine(), parameters=experiment.parameters)
        path.write_text(json.dumps(results, indent=1) + "\n")

    if "rates" not in results:
        results["rates"] = experiment.tune_rates()
        save()
    for seed in scale.seeds:
        for name, arm in (ARMS | RESETS).items():
            by_seed = results["arms"].setdefault(name, {})
            if str(seed) not in by_seed:
                by_seed[str(seed)] = experiment.run(name, arm, seed, results["rates"])
                save()
    seed, rates = scale.seeds[0], results["rates"]
    attacks = Attacks(experiment, rates, ARMS["only public"], ATTACK_FACTOR)
    sections: dict[str, dict[str, Callable[[], Any]]] = {
        "noise": {name: partial(curve, run, EPSILONS) for name, run in accounting_runs(scale).items()},
        "attacks": {name: partial(attacks.measure, name, arm, seed) for name, arm in ATTACK_ARMS.items()},
        "rules": {name: partial(experiment.run, name, arm, seed, rates) for name, arm in RULES.items()},
        "single_steps": {
            name: partial(single_steps, experiment, name, ARMS[name], rates, fraction, SINGLE_STEP_BATCHES, B2)
            for name, fraction in SINGLE_STEP_POINTS.items()
        },
    }
    for section, measurements in sections.items():
        stored = results.setdefault(section, {})
        for name, measure in measurements.items():
            if name not in stored:
                stored[name] = measure()
                save()
    dp_pretraining_page.write(results, path.with_suffix(".md"))


def accounting_runs(scale: Scale) -> dict[str, AccountingRun]:
    """Runs for the plot of noise by batch size: this experiment with at least 16 steps, and a large one."""
    units_read = scale.batch * scale.steps
    batches = tuple(2**power for power in range(scale.batch.bit_length() - 4, (units_read // 16).bit_length()))
    small = AccountingRun(scale.private, units_read / scale.private, DELTA, batches)
    return {"here": small} if scale == QUICK else {"here": small, "large": LARGE_RUN}


class Plan(NamedTuple):
    """Schedule and data of an arm.

    Attributes:
        steps: number of steps.
        switch: index of the first private step.
        mechanism: mechanism of the private steps; None without private steps.
        nonprivate: sequences of the non-private steps.
        private: sequences of the private steps.
    """

    steps: int
    switch: int
    mechanism: Mechanism | None
    nonprivate: np.ndarray
    private: np.ndarray


class Experiment:
    """Data, model and compiled functions shared by all arms."""

    def __init__(self, scale: Scale):
        self.scale = scale
        # One pass of the public steps in the arm with the largest public share.
        self.pool = round(max(arm.public_share for arm in ARMS.values() if arm.private) * scale.steps) * scale.batch
        self.text = source_code.load(self.pool, scale.private, scale.held_out)
        self.model = Model.from_config(CONFIG)
        self.parameters = sum(leaf.size for leaf in jax.tree.leaves(self.model.abstract_params()))
        self.losses = UnitLosses(self.model, OBJECTIVE, {}, {})
        self._mean_loss = jax.jit(lambda params, batch: jnp.mean(self.losses(params, batch, None)))
        self._losses = jax.jit(lambda params, batch: self.losses(params, batch, None))
        self._monitor_jit = jax.jit(self._monitor, static_argnames=("mechanism", "probes"))

    def tune_rates(self) -> dict[str, Any]:
        """Choose the learning rates of non-private ("plain") and private steps by the held-out loss on public data."""
        tried: dict[str, dict[str, float]] = {"plain": {}, "private": {}}
        public_mechanism = dataclasses.replace(self.mechanism(8.0, self.scale.tried), dataset_size=self.pool)
        for rate in RATES:
            for kind, mechanism in (("plain", None), ("private", public_mechanism)):
                state, update = self._start(0, rate, mechanism)
                batch = self._batches(self.text.public, mechanism, 0)
                for step in range(self.scale.tried):
                    state = update(state, batch(step))
                tried[kind][f"{rate:g}"] = self.held_out(state, self.text.public_held_out)
        return {kind: float(min(losses, key=losses.get)) for kind, losses in tried.items()} | {"tried": tried}

    def mechanism(self, epsilon: float, steps: int, clip: ClipRule = AutoS(), units: int | None = None) -> Mechanism:
        """The mechanism of `steps` private steps on `units` units (default: all private units)."""
        if epsilon == math.inf:
            return dataclasses.replace(self.mechanism(max(EPSILONS), steps, clip, units), noise_multiplier=0.0)
        return Mechanism.calibrated(
            epsilon=epsilon, delta=DELTA, dataset_size=units or self.scale.private, expected_batch=self.scale.batch,
            steps=steps, clip=clip,
        )  # fmt: skip

    def plan(self, arm: Arm) -> Plan:
        """Schedule and data of an arm."""
        steps = self.scale.steps * (FEW_UNITS_FACTOR if arm.few_units else 1)
        switch = sum(mixing_weight("switch", step, steps, arm.public_share) == 1 for step in range(steps))
        public, private = self.text.public, self.text.private
        if arm.few_units:
            private = private[:: len(private) // self.scale.held_out][: self.scale.held_out]
        nonprivate = {"public": [public], "private": [private], "everything": [public, private]}[arm.nonprivate]
        mechanism = self.mechanism(arm.epsilon, steps - switch, arm.clip, len(private)) if arm.private else None
        return Plan(steps, switch, mechanism, np.concatenate(nonprivate), private)

    def states(self, name: str, arm: Arm, plan: Plan, seed: int, rates: dict) -> Iterator[tuple[int, State]]:
        """Train an arm; yield the state before every step and after the last. Advancing donates the yielded state."""
        steps, switch, mechanism = plan.steps, plan.switch, plan.mechanism
        state, update = self._start(seed, rates["plain"], None)
        batch = self._batches(plan.nonprivate, None, seed)
        if mechanism:
            private_update = self._start(seed, rates["private"], mechanism)[1]
            private_batch = self._batches(plan.private, mechanism, seed)
        for step in track(range(steps), f"{name}, seed {seed}", steps, "steps"):
            yield step, state
            if step < switch:
                state = update(state, batch(step))
                continue
            if step == switch:
                state = state._replace(opt_state=reset_optimizer(state.opt_state, arm.reset))
            state = private_update(state, private_batch(step))
        yield steps, state

    def run(self, name: str, arm: Arm, seed: int, rates: dict) -> dict[str, Any]:
        """Train an arm; return held-out losses by step, the switch, the noise multiplier and the diagnostics."""
        scale, start = self.scale, time.monotonic()
        plan = self.plan(arm)
        mechanism, losses, diagnostics = plan.mechanism, [], []
        for step, state in self.states(name, arm, plan, seed, rates):
            if step % scale.every == 0 or step == plan.steps:
                losses.append([step, self.held_out(state, self.text.private_held_out)])
                if arm.monitored and seed == scale.seeds[0] and step < plan.steps:
                    diagnostics.append([step, self.monitor_step(state, mechanism, seed)])
        return {
            "losses": losses, "switch": plan.switch, "monitored": diagnostics,
            "seconds": round(time.monotonic() - start, 1),
            "noise_multiplier": mechanism and mechanism.noise_multiplier,
            # JSON has no infinity.
            "epsilon": mechanism.epsilon() if arm.private and arm.epsilon < math.inf else None,
        }  # fmt: skip

    def held_out(self, state: State, tokens: np.ndarray) -> float:
        """Mean loss of a state in nats per byte."""
        return self.loss(state.trainable, tokens)

    def loss(self, params: Any, tokens: np.ndarray) -> float:
        """Mean loss of parameters in nats per byte."""
        return float(self._mean_loss(params, full_rows(tokens)))

    def losses_per_sequence(self, params: Any, tokens: np.ndarray) -> np.ndarray:
        """Loss of each sequence in nats per byte."""
        parts = np.array_split(tokens, max(len(tokens) // self.scale.held_out, 1))
        return np.concatenate([self._losses(params, full_rows(part)) for part in parts])

    def monitor_step(
        self, state: State, mechanism: Mechanism, seed: int, units: int = 64, probes: int | None = None
    ) -> dict[str, float]:
        """Loss-improvement diagnostics of a private step with Adam, estimated on eight public batches."""
        tokens = self.text.public[: 8 * units].reshape(8, -1, source_code.LENGTH)
        batches = jax.tree.map(lambda *leaves: np.stack(leaves), *map(full_rows, tokens))
        metrics = self._monitor_jit(state, batches, jax.random.key(seed), mechanism, probes or self.scale.probes)
        return {name: float(value) for name, value in metrics.items()}

    def _monitor(self, state: State, batches, key, mechanism: Mechanism, probes: int):
        kwargs = dict(mechanism=mechanism, b2=B2, probes=probes)
        return improvement_metrics(self.losses, state.trainable, state.opt_state, batches, key, **kwargs)

    def _start(self, seed: int, rate: float, mechanism: Mechanism | None) -> tuple[State, Callable]:
        """Initial state and update step; public and private steps share the step counter that keys the noise."""
        optimizer = optax.adamw(rate, b2=B2, weight_decay=0.0)
        params = init_params(self.model, jax.random.key(seed))
        state = init_state(self.model, params, optimizer)
        # "scan" is the fastest method for a model of this size.
        update = make_update(self.model, OBJECTIVE, optimizer, privacy=mechanism, method="scan")
        kwargs = {} if mechanism is None else {"private_key": Secret.insecure(seed).noise}
        return state, lambda state, batch: update(state, batch, **kwargs)[0]

    def _batches(self, tokens: np.ndarray, mechanism: Mechanism | None, seed: int) -> Callable[[int], Any]:
        """Batches by step: Poisson samples of a mechanism, or shuffled epochs."""
        if mechanism is not None:
            sampling_key = Secret.insecure(seed).sampling

            def sample(step: int):
                indices, real = mechanism.sample(sampling_key, step)
                return full_rows(tokens[indices])._replace(real=real[:, None])

            return sample
        indices = self.unit_indices(len(tokens), None, seed)
        return lambda step: full_rows(tokens[indices(step)])

    def unit_indices(self, count: int, mechanism: Mechanism | None, seed: int) -> Callable[[int], np.ndarray]:
        """Unit indices by step; without a mechanism the function must be called for consecutive steps."""
        if mechanism is not None:
            sampling_key = Secret.insecure(seed).sampling

            def poisson(step: int):
                indices, real = mechanism.sample(sampling_key, step)
                return indices[real]

            return poisson
        epochs, size = self._shuffled_epochs(count, seed), self.scale.batch
        remaining: list[int] = []

        def shuffled(step: int):
            while len(remaining) < size:
                remaining.extend(next(epochs))
            return np.array([remaining.pop() for _ in range(size)])

        return shuffled

    @staticmethod
    def _shuffled_epochs(count: int, seed: int) -> Iterator[list[int]]:
        rng = np.random.default_rng(seed)
        while True:
            yield rng.permutation(count).tolist()


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
