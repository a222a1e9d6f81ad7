"""tunix worker: `DPOTrainer` on the pairs of a workload. Started by `throughput` in its own virtual environment.

The steps run inside `DPOTrainer.train`, as for tunix's users; the data iterator waits for a request before each step.
Prompts and completions are padded to the longest of the workload, like tunix's own preprocessing, which pads to fixed
lengths; the step is compiled once for these lengths.
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


def main(model: str, path: str, remat: str, microbatch_size: str) -> None:
    """Train and serve steps.

    Args:
        model: a Hugging Face directory.
        path: a workload file written by `workloads.write`.
        remat: `none`, `block` or `decoder`.
        microbatch_size: pairs per forward and backward pass.
    """
    steps = [[pair for group in step for pair in _pairs(group)] for step in json.loads(Path(path).read_text())]
    size, pairs = int(microbatch_size), len(steps[0])
    config = _model_config(json.loads((Path(model) / "config.json").read_text()), remat)
    load = lambda: weights.create_model_from_safe_tensors(model, config, dtype=jnp.float32)  # noqa: E731
    options = DPOTrainingConfig(
        eval_every_n_steps=10**9, gradient_accumulation_steps=pairs // size if size < pairs else None,
        max_inflight_computations=1,
    )  # fmt: skip
    policy = load()
    trainer = DPOTrainer(policy, load(), optax.adamw(1e-6), options)
    trainer.train(_steps_on_request(policy, steps, size))


def _steps_on_request(policy, steps, microbatch_size: int):
    """Yield microbatches of the warm-up steps, then of one timed step per line of standard input.

    A step has ended when the trainer requests the first microbatch of the next one.
    """
    widths = [max(len(pair[part]) for step in steps for pair in step) for part in range(3)]
    completion_width = max(widths[1:])
    for number, step in enumerate(itertools.cycle(steps)):
        if number == WARM_UP:
            print("ready {}", flush=True)
        if number >= WARM_UP and not sys.stdin.readline():
            os._exit(0)
        start = time.perf_counter()
        for first in range(0, len(step), microbatch_size):
            yield _training_input(step[first : first + microbatch_size], widths[0], completion_width)
        jax.block_until_ready(nnx.state(policy))
        if number >= WARM_UP:
            seconds = time.perf_counter() - start
            result = {"seconds": seconds, "peak_bytes": serving.peak_bytes(), "step": number % len(steps)}
            print("step " + json.dumps(result), flush=True)


def _model_config(config: dict, remat: str) -> llama3.ModelConfig:
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
    completions = group["answers"]
    return [(group["prompt"], chosen, rejected) for chosen, rejected in zip(completions[0::2], completions[1::2])]


def _training_input(pairs, prompt_width: int, completion_width: int) -> TrainingInput:
    def pad(sequences, width, left=False):
        tokens, mask = np.zeros((len(pairs), width), np.int32), np.zeros((len(pairs), width), np.int32)
        for row, sequence in enumerate(sequences):
            columns = slice(width - len(sequence), width) if left else slice(0, len(sequence))
            tokens[row, columns], mask[row, columns] = sequence, 1
        return tokens, mask

    prompts, chosen, rejected = zip(*pairs)
    return TrainingInput(
        *pad(prompts, prompt_width, left=True), *pad(chosen, completion_width), *pad(rejected, completion_width)
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
