"""Full update steps of the privacy benchmark: non-private, private with every method, and with jax_privacy.

python -m benchmarks.private_steps '{"length": 512, "units": 4}' ghost     peak memory of a process that runs two steps
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
# SmolLM2 is loaded from its checkpoint; the other models are initialized at random.
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


class Workload(NamedTuple):
    """Model and batch of a step: `units` sequences of `length` tokens, one full row each.

    Attributes:
        length: tokens per sequence.
        units: sequences per step.
        shape: a key of `SHAPES`.
        rank: LoRA rank; 0 trains all parameters.
        tied: keep the head tied to the embedding.
    """

    length: int
    units: int
    shape: str = "smollm2-135m"
    rank: int = 0
    tied: bool = True


def settings(parts: int) -> dict[str, tuple[str, int]]:
    """Method and number of microbatches by setting name: every method with one microbatch and with `parts`."""
    suffixes = {"": 1, f", {parts} parts": parts} if parts > 1 else {"": 1}
    methods = ("plain", "vmap", "ghost", "bk", "group")
    return {f"{method}{suffix}": (method, count) for method in methods for suffix, count in suffixes.items()} | {
        "scan": ("scan", 1)
    }


class Steps:
    """A model, its training state and a batch; all settings update the same state."""

    def __init__(self, workload: Workload):
        self.workload = workload
        self.model, params = _load_model(workload)
        self._optimizer = Optimizer(learning_rate=1e-6, schedule="constant").build(1000)
        trainable = None
        if workload.rank:
            self.model = dataclasses.replace(self.model, lora=Lora(workload.rank, 2.0 * workload.rank))
            params, trainable = self.model.with_adapters(params, jax.random.key(1)), is_adapter
        tokens = np.random.default_rng(0).integers(self.model.config.vocab_size, size=(workload.units, workload.length))
        self.batch = jax.tree.map(jnp.asarray, full_rows(tokens))
        self.state = init_state(self.model, params, self._optimizer, trainable=trainable)
        self.trainable_size = sum(leaf.size for leaf in jax.tree.leaves(self.state.trainable))
        self._updates: dict[tuple[str, int], Callable] = {}

    def mechanism(self, groupwise: bool = False) -> Mechanism:
        """The mechanism of the private steps; the expected batch size equals the batch size."""
        clip, count = FlatClip(1.0), self.workload.units
        if groupwise:
            clip = Groupwise(clip, count_groups(self.state.trainable))
        return Mechanism(
            dataset_size=100 * count, expected_batch=count, steps=100, noise_multiplier=1.0, delta=1e-6,
            largest_batch=count, clip=clip,
        )  # fmt: skip

    def __call__(self, method: str, parts: int) -> None:
        """Run one step and wait for its result.

        Args:
            method: "plain", a private method, or "jax_privacy".
            parts: number of microbatches; for "jax_privacy" the microbatch size.
        """
        if (method, parts) not in self._updates:
            self._updates[method, parts] = self._build_update(method, parts)
        self.state = jax.block_until_ready(self._updates[method, parts](self.state, self.batch))

    def _build_update(self, method: str, parts: int) -> Callable[[State, Batch], State]:
        if method == "jax_privacy":
            return self._jax_privacy_update(parts)
        options = {"microbatches": parts}
        if method == "plain":
            update = make_update(self.model, OBJECTIVE, self._optimizer, **options)
            return lambda state, batch: update(state, batch)[0]
        mechanism, root = self.mechanism(method == "group"), jax.random.key(ROOT)
        update = make_update(self.model, OBJECTIVE, self._optimizer, privacy=mechanism, method=method, **options)
        return lambda state, batch: update(state, batch, private_key=root)[0]

    def _jax_privacy_update(self, microbatch_size: int) -> Callable[[State, Batch], State]:
        """The same step with clipping and noise from jax_privacy around this library's losses."""
        mechanism = self.mechanism()
        noise = noise_addition.gaussian_privatizer(stddev=mechanism.noise_stddev, prng_key=jax.random.key(ROOT))

        def step(state: State, batch: Batch) -> State:
            losses = UnitLosses(self.model, OBJECTIVE, state.frozen, state.targets)
            clipped = clipped_grad(
                lambda trainable, unit: losses(trainable, unit, None)[0],
                l2_clip_norm=1.0,
                microbatch_size=microbatch_size,
            )
            total = clipped(state.trainable, batch)
            noisy, _ = noise.update(total, noise.init(total))
            grads = jax.tree.map(lambda leaf: leaf / mechanism.expected_batch, noisy)
            updates, opt_state = self._optimizer.update(grads, state.opt_state, state.trainable)
            trainable = optax.apply_updates(state.trainable, updates)
            return state._replace(trainable=trainable, opt_state=opt_state, step=state.step + 1)

        return jax.jit(step, donate_argnums=0)


def _load_model(workload: Workload) -> tuple[Model, dict]:
    compute_dtype = jnp.dtype("float32" if jax.default_backend() == "cpu" else "bfloat16")
    if SHAPES[workload.shape] is None:
        model, params = load_hf(fetch.smollm2(), compute_dtype=compute_dtype, remat="dots")
        if workload.tied:
            return model, params
        model = dataclasses.replace(model, config=dataclasses.replace(model.config, tie_word_embeddings=False))
        return model, params | {"head": {"kernel": jnp.array(params["embed"]["table"].T)}}
    config = dataclasses.replace(SHAPES[workload.shape], tie_word_embeddings=workload.tied)
    model = Model.from_config(config, compute_dtype=compute_dtype, remat="dots")
    return model, init_params(model, jax.random.key(0))


def main(workload: str, method: str, parts: str = "1", steps: int = 2) -> None:
    """Run steps of one setting and print the peak resident memory as JSON."""
    run_step = Steps(Workload(**json.loads(workload)))
    for _ in range(steps):
        run_step(method, int(parts))
    print(json.dumps({"peak_bytes": serving.peak_bytes()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
