"""Evaluate a model directory, a run or a checkpoint: reward, accuracy, KL and an objective's metrics."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from shiq_jax.errors import Refusal


@dataclass(frozen=True)
class Evaluate:
    """What to evaluate, on what."""

    model: str
    """Directory in Hugging Face format, hub id, or a run's directory, its checkpoints, or one of them."""
    data: str
    """Rows with `prompt` and what the reward needs, or whole examples of an objective; see docs/data.md."""
    reward: str | None = None
    """exact, sorting, bfcl or module:function(row, completion) -> float; without one nothing is scored."""
    reference: str | None = None
    """What the KL is measured to: a directory or hub id; default: the run's own reference, if the model is a run's."""
    objective: Literal["shiq", "dpo", "sft"] | None = None
    """Whose metrics to measure; default: the one that the rows are examples of, else ShiQ's on the fresh samples."""
    beta: float = 0.1
    """Temperature of that objective."""
    output_dir: Path | None = None
    """Where evaluation.json, evaluation.png and samples.jsonl go; default: runs/eval."""
    seed: int = 0
    """Of the samples."""
    resume: bool = False
    """Go on in an output directory of the same options; a finished evaluation is shown again."""
    prompts: int = 512
    """How many rows, at most."""
    samples_per_prompt: int = 1
    """Fresh temperature-1 samples of each."""
    prompts_per_batch: int = 16
    """Prompts of one compiled call."""
    max_tokens: int = 64
    """Longest completion."""
    greedy: bool = True
    """Also decode every prompt greedily."""
    mesh: str | None = None
    """Devices by axis, such as fsdp=4,tensor=2; default: all devices on fsdp."""
    compute: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the model's layers."""

    def __post_init__(self):
        for name in ("prompts", "samples_per_prompt", "prompts_per_batch", "max_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not self.beta > 0:
            raise ValueError(f"beta must be positive, not {self.beta}")

    def settings(self) -> dict[str, Any]:
        """All options that determine the result, as JSON values."""
        values = dataclasses.asdict(self)
        for name in ("resume", "output_dir"):
            values.pop(name)
        return {"command": "eval"} | values


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line, evaluate, and turn a refusal into one sentence and exit code 2."""
    options = tyro.cli(Evaluate, args=arguments, description=__doc__)
    try:
        from shiq_jax.training.standalone import evaluate

        evaluate(options)
    except Refusal as refusal:
        print(f"eval.py: {refusal}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
