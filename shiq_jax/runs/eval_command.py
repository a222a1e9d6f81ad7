"""Evaluate a run, a checkpoint or a model: reward, accuracy, KL and loss.

examples:
  python eval.py --model runs/shiq --data FILE --reward exact
  python eval.py --model DIR --reference DIR --data FILE
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from shiq_jax.runs.command_line import program_name, report_errors
from shiq_jax.runs.loss_options import optional_arg

Objectives = Literal["shiq", "dpo", "kto", "sft"]


@dataclass(frozen=True)
class Evaluate:
    """Policy, data and settings of an evaluation."""

    model: str
    """Policy: a run, a checkpoint of a run, a model directory, or a hub id."""
    data: str
    """Rows with `prompt` and the fields that the reward needs, or training examples; see docs/data.md."""
    reward: Annotated[str | None, optional_arg("NAME", "none: no scores")] = None
    """Reward: exact, sorting, bfcl, or module:function(row, completion) -> float."""
    reference: Annotated[str | None, optional_arg("DIR|HUB_ID", "the reference of the run")] = None
    """Reference model of the KL."""
    output_dir: Annotated[Path | None, optional_arg("DIR", "runs/eval")] = None
    """Output directory for evaluation.json, evaluation.png and samples.jsonl."""
    resume: bool = False
    """Reuse an output directory with the same options; a finished evaluation is only printed."""
    prompts: int = 512
    """Maximum number of rows."""
    samples_per_prompt: int = 1
    """Samples per prompt, at temperature 1."""
    max_tokens: int = 64
    """Maximum number of tokens of a completion."""
    greedy: bool = True
    """Also evaluate greedy decoding."""
    seed: int = 0
    """Random seed of sampling."""
    objective: Annotated[Objectives | None, optional_arg("{shiq,dpo,kto,sft}", "inferred from the rows")] = None
    """Objective whose loss and metrics are computed, on the rows if they are its examples, else on the samples."""
    beta: float = 0.1
    """KL coefficient beta of the objective."""
    score: Annotated[str | None, optional_arg("FIELD", "see docs/data.md")] = None
    """Field of the data that holds the scores."""
    prompts_in_flight: int = 32
    """Prompts that are decoded concurrently."""
    mesh: Annotated[str | None, optional_arg("AXIS=N,...", "all devices on fsdp")] = None
    """Mesh shape by axis (replica, fsdp, tensor), for example fsdp=4,tensor=2."""
    compute: Literal["float32", "bfloat16"] = "float32"
    """Compute dtype of the model's layers."""

    def __post_init__(self):
        for name in ("prompts", "samples_per_prompt", "prompts_in_flight", "max_tokens"):
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
    """Parse the command line and evaluate; an error is printed as one sentence, with exit code 2."""
    name = program_name("eval.py", "shiq-eval")
    description = __doc__ if name == "eval.py" else __doc__.replace("python eval.py", name)
    options = tyro.cli(Evaluate, args=arguments, prog=name, description=description)
    with report_errors(name, "repeat the command with --resume to evaluate again"):
        from shiq_jax.runs.compilation_cache import enable_compilation_cache
        from shiq_jax.runs.evaluate import evaluate

        enable_compilation_cache()
        evaluate(options)
