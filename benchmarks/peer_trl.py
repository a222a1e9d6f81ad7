"""TRL worker: `DPOTrainer` on the pairs of a workload. Started by `throughput` in its own virtual environment.

The steps run inside `DPOTrainer.train`, as for TRL's users; a callback waits for a request before each step.
"""

import json
import os
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers
import trl
from datasets import Dataset

from benchmarks import serving

WARM_UP = 1


class StepOnRequest(transformers.TrainerCallback):
    """Runs the warm-up steps, then one timed step per line of standard input."""

    def __init__(self, steps: int):
        self._steps, self._count, self._start = steps, 0, 0.0

    def on_step_begin(self, *_, **__):
        self._count += 1
        if self._count == WARM_UP + 1:
            print("ready {}", flush=True)
        if self._count > WARM_UP and not sys.stdin.readline():
            os._exit(0)
        self._start = time.perf_counter()

    def on_step_end(self, *_, **__):
        if self._count > WARM_UP:
            seconds, number = time.perf_counter() - self._start, (self._count - 1) % self._steps
            result = {"seconds": seconds, "peak_bytes": serving.peak_bytes(), "step": number}
            print("step " + json.dumps(result), flush=True)


class Trainer(trl.DPOTrainer):
    """DPOTrainer for tokenized data, without shuffling."""

    def _prepare_dataset(self, dataset, *_, **__):
        return dataset

    def _get_train_sampler(self, *_, **__):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def main(model: str, path: str, precompute: str, checkpointing: str, microbatch_size: str) -> None:
    """Train and serve steps.

    Args:
        model: a Hugging Face directory.
        path: a workload file written by `workloads.write`.
        precompute: `yes` to precompute the reference's log-probabilities.
        checkpointing: `yes` for gradient checkpointing.
        microbatch_size: pairs per forward and backward pass.
    """
    steps = json.loads(Path(path).read_text())
    pairs = [pair for step in steps for group in step for pair in _pairs(group)]
    batch_size = len(pairs) // len(steps)
    with tempfile.TemporaryDirectory() as directory:
        settings = trl.DPOConfig(
            output_dir=directory, use_cpu=True, bf16=False, fp16=False, report_to=[], save_strategy="no",
            precompute_ref_log_probs=precompute == "yes", gradient_checkpointing=checkpointing == "yes",
            per_device_train_batch_size=int(microbatch_size),
            gradient_accumulation_steps=batch_size // int(microbatch_size),
            max_length=None, max_steps=10_000, learning_rate=1e-6, lr_scheduler_type="constant",
            logging_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        load = lambda: transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)  # noqa: E731
        Trainer(
            model=load(), ref_model=None if precompute == "yes" else load(), args=settings,
            train_dataset=Dataset.from_list(pairs),
            processing_class=transformers.AutoTokenizer.from_pretrained(model), callbacks=[StepOnRequest(len(steps))],
        ).train()  # fmt: skip


def _pairs(group):
    return [
        {"prompt_ids": group["prompt"], "chosen_ids": chosen, "rejected_ids": rejected}
        for chosen, rejected in zip(group["answers"][0::2], group["answers"][1::2])
    ]


if __name__ == "__main__":
    main(*sys.argv[1:])
