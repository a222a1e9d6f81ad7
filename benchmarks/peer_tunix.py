"""tunix's DPOTrainer on a work's pairs, in one setting. Run by `throughput` in an environment of its own.

Its `train` does everything, and so what is timed is what its users get; the data wait for the word to begin a step.
Prompts and answers are padded to the longest of the work, because its step compiles for one pair of lengths, and its
own preprocessing pads to lengths that are given beforehand.
"""

import itertools
import json
import os
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tunix.models.llama3 import model as llama3
from tunix.models.llama3 import params as weights
from tunix.sft.dpo.dpo_trainer import DPOTrainer, DPOTrainingConfig, TrainingInput

from benchmarks import serving

WARM_UP = 2


def main(model: str, work: str, remat: str, micro: str) -> None:
    """Trains and serves.

    Args:
        model: a Hugging Face directory.
        work: a file of `works.write`.
        remat: `none`, `block` or `decoder`.
        micro: pairs of a forward and backward pass; their gradients are accumulated to a step.
    """
    steps = [[pair for group in step for pair in _pairs(group)] for step in json.loads(Path(work).read_text())]
    micro, pairs = int(micro), len(steps[0])
    configuration = _configuration(json.loads((Path(model) / "config.json").read_text()), remat)
    load = lambda: weights.create_model_from_safe_tensors(model, configuration, dtype=jnp.float32)  # noqa: E731
    options = DPOTrainingConfig(
        eval_every_n_steps=10**9, gradient_accumulation_steps=pairs // micro if micro < pairs else None,
        max_inflight_computations=1,
    )  # fmt: skip
    policy = load()
    trainer = DPOTrainer(policy, load(), optax.adamw(1e-6), options)
    trainer.train(_turns(policy, steps, micro))


def _turns(policy, steps, micro: int):
    """Two steps to warm up, then each step when it is asked for; asked for the next slice, the last step is over."""
    widths = [max(len(pair[place]) for step in steps for pair in step) for place in range(3)]
    answers, began = max(widths[1:]), 0.0
    for number, step in enumerate(itertools.cycle(steps)):
        if number == WARM_UP:
            print("ready {}", flush=True)
        if number >= WARM_UP and not sys.stdin.readline():
            os._exit(0)
        began = time.perf_counter()
        for start in range(0, len(step), micro):
            yield _input(step[start : start + micro], widths[0], answers)
        jax.block_until_ready(nnx.state(policy))
        if number >= WARM_UP:
            seconds = time.perf_counter() - began
            found = {"seconds": seconds, "peak_bytes": serving.peak_bytes(), "step": number % len(steps)}
            print("step " + json.dumps(found), flush=True)


def _configuration(config: dict, remat: str) -> llama3.ModelConfig:
    heads = config["num_attention_heads"]
    return llama3.ModelConfig(
        num_layers=config["num_hidden_layers"], vocab_size=config["vocab_size"], embed_dim=config["hidden_size"],
        hidden_dim=config["intermediate_size"], num_heads=heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        num_kv_heads=config["num_key_value_heads"], norm_eps=config["rms_norm_eps"],
        rope_theta=int(config.get("rope_theta") or config["rope_parameters"]["rope_theta"]),
        weight_tying=config["tie_word_embeddings"], remat_config=llama3.RematConfig[remat.upper()],
    )  # fmt: skip


def _pairs(group):
    better, worse = group["answers"][0::2], group["answers"][1::2]
    return [(group["prompt"], chosen, rejected) for chosen, rejected in zip(better, worse)]


def _input(pairs, prompt: int, answer: int) -> TrainingInput:
    def padded(sequences, width, left):
        tokens, mask = np.zeros((len(pairs), width), np.int32), np.zeros((len(pairs), width), np.int32)
        for row, sequence in enumerate(sequences):
            where = slice(width - len(sequence), width) if left else slice(0, len(sequence))
            tokens[row, where], mask[row, where] = sequence, 1
        return tokens, mask

    prompts, chosen, rejected = zip(*pairs)
    return TrainingInput(
        *padded(prompts, prompt, True), *padded(chosen, answer, False), *padded(rejected, answer, False)
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
