"""Evaluate: reward of fresh samples on prompts, and the KL to a reference, of a model directory or a run's checkpoint."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from shiq_jax.errors import Refusal


@dataclass(frozen=True)
class Evaluate:
    """What to evaluate, on what."""

    model: str
    """Directory in Hugging Face format, hub id, or a run's directory, its checkpoints, or one of them."""
    data: str
    """Prompts: rows with `prompt` and what the reward needs (.jsonl, .json, .parquet or a hub id)."""
    reward: str | None = None
    """exact, sorting, bfcl or module:function(row, completion) -> float; without one only lengths and the KL are measured."""
    reference: str | None = None
    """What the KL is measured to: a directory or hub id; default: the run's own reference, if the model is a run's."""
    output_dir: Path | None = None
    """Where evaluation.json and samples.jsonl go; default: runs/eval."""
    seed: int = 0
    """Of the samples."""
    prompts: int | None = None
    """How many prompts, at most; default: all."""
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
    resume: bool = False
    """Show the result that the output directory holds instead of refusing to overwrite it."""


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line, evaluate, and turn a refusal into one sentence and exit code 2."""
    options = tyro.cli(Evaluate, args=arguments, description=__doc__)
    try:
        from shiq_jax.training.standalone import evaluate

        print(json.dumps(evaluate(options), indent=2))
    except Refusal as refusal:
        print(f"eval.py: {refusal}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
