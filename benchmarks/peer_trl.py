"""TRL's DPOTrainer on a work's pairs, in one setting. Run by `throughput` in an environment of its own.

Its `train` does everything, and so what is timed is what its users get; a callback waits for the word to begin a step.
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


class Turns(transformers.TrainerCallback):
    """A step to warm up, then each step when it is asked for."""

    def __init__(self, steps: int):
        self._steps, self._begun, self._at = steps, 0, 0.0

    def on_step_begin(self, *_, **__):
        self._begun += 1
        if self._begun == WARM_UP + 1:
            print("ready {}", flush=True)
        if self._begun > WARM_UP and not sys.stdin.readline():
            os._exit(0)
        self._at = time.perf_counter()

    def on_step_end(self, *_, **__):
        if self._begun > WARM_UP:
            seconds, number = time.perf_counter() - self._at, (self._begun - 1) % self._steps
            found = {"seconds": seconds, "peak_bytes": serving.peak_bytes(), "step": number}
            print("step " + json.dumps(found), flush=True)


class Trainer(trl.DPOTrainer):
    """Takes token ids as they are, in their order."""

    def _prepare_dataset(self, dataset, *_, **__):
        return dataset

    def _get_train_sampler(self, *_, **__):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def main(model: str, work: str, precompute: str, checkpointing: str, micro: str) -> None:
    """Trains and serves.

    Args:
        model: a Hugging Face directory.
        work: a file of `works.write`.
        precompute: `yes` for log-probabilities of the reference made beforehand.
        checkpointing: `yes` for gradient checkpointing.
        micro: pairs of a forward and backward pass; their gradients are accumulated to a step.
    """
    steps = json.loads(Path(work).read_text())
    pairs = [pair for step in steps for group in step for pair in _pairs(group)]
    each = len(pairs) // len(steps)
    with tempfile.TemporaryDirectory() as directory:
        settings = trl.DPOConfig(
            output_dir=directory, use_cpu=True, bf16=False, fp16=False, report_to=[], save_strategy="no",
            precompute_ref_log_probs=precompute == "yes", gradient_checkpointing=checkpointing == "yes",
            per_device_train_batch_size=int(micro), gradient_accumulation_steps=each // int(micro),
            max_length=None, max_steps=10_000, learning_rate=1e-6, lr_scheduler_type="constant",
            logging_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        load = lambda: transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)  # noqa: E731
        Trainer(
            model=load(), ref_model=None if precompute == "yes" else load(), args=settings,
            train_dataset=Dataset.from_list(pairs),
            processing_class=transformers.AutoTokenizer.from_pretrained(model), callbacks=[Turns(len(steps))],
        ).train()  # fmt: skip


def _pairs(group):
    better, worse = group["answers"][0::2], group["answers"][1::2]
    return [
        {"prompt_ids": group["prompt"], "chosen_ids": chosen, "rejected_ids": rejected}
        for chosen, rejected in zip(better, worse)
    ]


if __name__ == "__main__":
    main(*sys.argv[1:])
