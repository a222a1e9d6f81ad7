"""Evaluate a run, a checkpoint or a model: reward, accuracy, KL, loss.

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

from shiq_jax.runs.command_line import one_sentence, program
from shiq_jax.runs.loss_options import given_as

Objectives = Literal["shiq", "dpo", "kto", "sft"]


@dataclass(frozen=True)
class Evaluate:
    """What to evaluate, and on which rows."""

    model: str
    """A run, its checkpoints or one of them; or a model's directory or hub id."""
    data: str
    """Rows with `prompt` and what the reward needs, or an objective's examples; see docs/data.md."""
    reward: Annotated[str | None, given_as("NAME", "nothing is scored")] = None
    """exact, sorting, bfcl or module:function(row, completion) -> float."""
    reference: Annotated[str | None, given_as("DIR|HUB_ID", "the run's own")] = None
    """Model that the KL is measured to."""
    output_dir: Annotated[Path | None, given_as("DIR", "runs/eval")] = None
    """Where evaluation.json, evaluation.png and samples.jsonl go."""
    resume: bool = False
    """Continue in an output directory of the same options; a finished evaluation is shown again."""
    prompts: int = 512
    """Maximum number of rows."""
    samples_per_prompt: int = 1
    """Fresh temperature-1 samples of each prompt."""
    max_tokens: int = 64
    """Longest completion, in tokens."""
    greedy: bool = True
    """Also decode greedily."""
    seed: int = 0
    """Seed of the samples."""
    objective: Annotated[Objectives | None, given_as("{shiq,dpo,kto,sft}", "by the rows")] = None
    """Objective whose metrics are measured, on the rows if they are its examples, else on the fresh samples."""
    beta: float = 0.1
    """Temperature of that objective."""
    score: Annotated[str | None, given_as("FIELD", "see docs/data.md")] = None
    """Field of the rows that holds the scores of their answers."""
    prompts_in_flight: int = 32
    """Prompts that are decoded at once."""
    mesh: Annotated[str | None, given_as("AXIS=N,...", "all devices on fsdp")] = None
    """Devices by axis (replica, fsdp, tensor), such as fsdp=4,tensor=2."""
    compute: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the model's layers."""

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
    """Parse the command line and evaluate; a refusal is one sentence and exit code 2."""
    name = program("eval.py", "shiq-eval")
    about = __doc__ if name == "eval.py" else __doc__.replace("python eval.py", name)
    options = tyro.cli(Evaluate, args=arguments, prog=name, description=about)
    with one_sentence(name, "the same command with --resume measures again"):
        from shiq_jax.runs.compilation_cache import enable_compilation_cache
        from shiq_jax.runs.evaluate import evaluate

        enable_compilation_cache()
        evaluate(options)
