"""Update steps on units of one length, private by every method and not, whole with the optimiser; see `privacy`.

python -m benchmarks.private_steps '{"length": 512, "units": 4}' ghost     peak memory of a process that takes two
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax_privacy import clipped_grad, noise_addition

from benchmarks import serving
from shiq_jax.models import DecoderConfig, Lora, Model, init_params, is_adapter, load_hf
from shiq_jax.objectives import OBJECTIVES
from shiq_jax.privacy import FlatClip, Groupwise, Mechanism, count_groups
from shiq_jax.replay import Batch, full_rows
from shiq_jax.tasks import fetch
from shiq_jax.training.optimizers import Optimizer
from shiq_jax.training.private_gradient import UnitLosses
from shiq_jax.training.state import State, init_state
from shiq_jax.training.update import make_update

ROOT = 7
OBJECTIVE = OBJECTIVES["sft"]
# By name, in float32 on a CPU and with bfloat16 arithmetic elsewhere. The first has weights of its own.
SHAPES = {
    "smollm2-135m": None,
    "llama-1.5b": DecoderConfig(
        vocab_size=128_256, hidden_size=2048, intermediate_size=8192, num_layers=20, num_heads=32, num_kv_heads=8,
        max_positions=8192, tie_word_embeddings=True,
    ),
    "tiny": DecoderConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, num_kv_heads=2,
        tie_word_embeddings=True,
    ),
}  # fmt: skip


class Work(NamedTuple):
    """What a step is taken on: `units` sequences of `length` tokens, a row each, which fill their rows.

    shape: of the model, see `SHAPES`. rank: of LoRA, 0 to train all parameters. tied: keep the head tied.
    """

    length: int
    units: int
    shape: str = "smollm2-135m"
    rank: int = 0
    tied: bool = True


def settings(parts: int) -> dict[str, tuple[str, int]]:
    """By name the method and into how many parts a step is cut, one and `parts`: plain and all that are private."""
    cut = {"": 1, f", {parts} parts": parts} if parts > 1 else {"": 1}
    methods = ("plain", "vmap", "ghost", "bk", "group")
    return {f"{method}{name}": (method, count) for method in methods for name, count in cut.items()} | {
        "scan": ("scan", 1)
    }


class Steps:
    """A model, its state and a batch, and steps on them; each setting's step continues from the last one's state."""

    def __init__(self, work: Work):
        self.work = work
        self.model, params = _loaded(work)
        self._rule = Optimizer(learning_rate=1e-6, schedule="constant").build(1000)
        trainable = None
        if work.rank:
            self.model = dataclasses.replace(self.model, lora=Lora(work.rank, 2.0 * work.rank))
            params, trainable = self.model.with_adapters(params, jax.random.key(1)), is_adapter
        drawn = np.random.default_rng(0).integers(self.model.config.vocab_size, size=(work.units, work.length))
        self.batch = jax.tree.map(jnp.asarray, full_rows(drawn))
        self.state = init_state(self.model, params, self._rule, trainable=trainable)
        self.numbers = sum(leaf.size for leaf in jax.tree.leaves(self.state.trainable))
        self._updates: dict[tuple[str, int], Callable] = {}

    def mechanism(self, groupwise: bool = False) -> Mechanism:
        """Of every private step: as many units as the batch has are expected."""
        clip, count = FlatClip(1.0), self.work.units
        if groupwise:
            clip = Groupwise(clip, count_groups(self.state.trainable))
        return Mechanism(
            dataset_size=100 * count, expected_batch=count, steps=100, noise_multiplier=1.0, delta=1e-6,
            largest_batch=count, clip=clip,
        )  # fmt: skip

    def __call__(self, method: str, parts: int) -> None:
        """One step, to its end; method: "plain", one of ours, or "jax_privacy" with so many units at once."""
        if (method, parts) not in self._updates:
            self._updates[method, parts] = self._made(method, parts)
        self.state = jax.block_until_ready(self._updates[method, parts](self.state, self.batch))

    def _made(self, method: str, parts: int) -> Callable[[State, Batch], State]:
        if method == "jax_privacy":
            return self._theirs(parts)
        options = {"microbatches": parts}
        if method == "plain":
            update = make_update(self.model, OBJECTIVE, self._rule, **options)
            return lambda state, batch: update(state, batch)[0]
        mechanism, root = self.mechanism(method == "group"), jax.random.key(ROOT)
        update = make_update(self.model, OBJECTIVE, self._rule, privacy=mechanism, method=method, **options)
        return lambda state, batch: update(state, batch, private_key=root)[0]

    def _theirs(self, at_once: int) -> Callable[[State, Batch], State]:
        """The same step with the clipping and the noise of jax_privacy around the same losses."""
        mechanism = self.mechanism()
        noise = noise_addition.gaussian_privatizer(stddev=mechanism.noise_stddev, prng_key=jax.random.key(ROOT))

        def step(state: State, batch: Batch) -> State:
            losses = UnitLosses(self.model, OBJECTIVE, state.frozen, state.targets)
            clipped = clipped_grad(
                lambda trainable, unit: losses(trainable, unit, None)[0], l2_clip_norm=1.0, microbatch_size=at_once
            )
            total = clipped(state.trainable, batch)
            noisy, _ = noise.update(total, noise.init(total))
            grads = jax.tree.map(lambda leaf: leaf / mechanism.expected_batch, noisy)
            updates, memory = self._rule.update(grads, state.opt_state, state.trainable)
            trainable = optax.apply_updates(state.trainable, updates)
            return state._replace(trainable=trainable, opt_state=memory, step=state.step + 1)

        return jax.jit(step, donate_argnums=0)


def _loaded(work: Work) -> tuple[Model, dict]:
    compute = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    if SHAPES[work.shape] is None:
        model, params = load_hf(fetch.smollm2(), compute_dtype=jnp.dtype(compute), remat="dots")
        if work.tied:
            return model, params
        model = dataclasses.replace(model, config=dataclasses.replace(model.config, tie_word_embeddings=False))
        return model, params | {"head": {"kernel": jnp.array(params["embed"]["table"].T)}}
    config = dataclasses.replace(SHAPES[work.shape], tie_word_embeddings=work.tied)
    model = Model.from_config(config, compute_dtype=jnp.dtype(compute), remat="dots")
    return model, init_params(model, jax.random.key(0))


def main(work: str, method: str, parts: str = "1", steps: int = 2) -> None:
    """Takes some steps and prints the most memory that was resident, as JSON."""
    taken = Steps(Work(**json.loads(work)))
    for _ in range(steps):
        taken(method, int(parts))
    print(json.dumps({"peak_bytes": serving.peak_bytes()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
