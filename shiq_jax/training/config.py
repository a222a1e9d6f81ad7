"""The options of a run, grouped as the command line shows them."""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from shiq_jax.rollout.generate import Sampling
from shiq_jax.training.optimizers import Optimizer


def _at_least(options: Any, **smallest: float) -> None:
    """ValueError naming the first option that is smaller than it may be; NaN is smaller than anything."""
    for name, least in smallest.items():
        if not getattr(options, name) >= least:
            raise ValueError(f"{name} must be at least {least}, not {getattr(options, name)}")


def _positive(beta: float) -> None:
    if not beta > 0:
        raise ValueError(f"beta must be positive, not {beta}")


@dataclass(frozen=True)
class WarmStart:
    """A few supervised updates on demonstrations, before anything is sampled, make the reference."""

    steps: int = 0
    """Updates; 0 starts from the model as it is."""
    batch_size: int = 32
    """Demonstrations of an update."""
    demonstrations: int = 2048
    """How many demonstrations to use at most."""
    optimizer: Optimizer = Optimizer(learning_rate=2e-3, schedule="cosine")

    def __post_init__(self):
        _at_least(self, steps=0, batch_size=1, demonstrations=1)


@dataclass(frozen=True)
class Collection:
    """What is sampled from the reference into the replay buffer."""

    prompts: int = 512
    """Prompts of the training split."""
    samples_per_prompt: int = 4
    """Answers to each of them."""
    prompts_per_batch: int = 32
    """Prompts of one compiled call of the sampler."""
    sampling: Sampling = Sampling()

    def __post_init__(self):
        _at_least(self, prompts=1, samples_per_prompt=1, prompts_per_batch=1)


@dataclass(frozen=True)
class Evaluation:
    """Fresh temperature-1 samples on held-out prompts."""

    data: str | None = None
    """Prompts to evaluate on (rows with `prompt` and what the reward needs); default: the task's held-out split."""
    prompts: int = 128
    """How many of them, at most."""
    samples_per_prompt: int = 4
    """Samples of each."""
    prompts_per_batch: int = 32
    """Prompts of one compiled call of the sampler."""
    max_tokens: int = 64
    """Longest completion."""
    times: int = 4
    """Evaluations during the passes, evenly spread; the last one comes after the last update."""
    greedy: bool = True
    """Also decode every prompt greedily."""

    def __post_init__(self):
        _at_least(self, prompts=1, samples_per_prompt=1, prompts_per_batch=1, max_tokens=1, times=0)


@dataclass(frozen=True)
class Precision:
    """Numbers and memory of the forward pass."""

    compute: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the model's layers; parameters, statistics and losses are float32 always."""
    remat: Literal["none", "full", "dots"] = "none"
    """What is recomputed in the backward pass instead of stored."""


@dataclass(frozen=True)
class NoOptions:
    """A loss without options."""


@dataclass(frozen=True)
class ShiqLoss:
    """Options of the ShiQ loss."""

    beta: float = 0.1
    """Temperature of the KL regularisation: rewards are divided by it."""
    gamma: float = 1.0
    """Discount per action."""
    normalisation: Literal["sum_t", "mean_t"] = "sum_t"
    """Whether squared residuals of a sequence are summed or averaged."""
    position_weight: Literal["none", "inv_position"] = "none"
    """Weight of the k-th action's squared residual: 1, or 1/k."""

    def __post_init__(self):
        _positive(self.beta)
        if not 0 < self.gamma <= 1:
            raise ValueError(f"gamma must lie in (0, 1], not {self.gamma}")


@dataclass(frozen=True)
class DpoLoss:
    """Options of the DPO loss."""

    beta: float = 0.1
    """Temperature of the KL regularisation."""
    label_smoothing: float = 0.0
    """Probability that a preference is the wrong way round."""

    def __post_init__(self):
        _positive(self.beta)
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing must lie in [0, 0.5), not {self.label_smoothing}")


@dataclass(frozen=True)
class Job:
    """What every training command takes."""

    model: str | None = None
    """Directory in Hugging Face format or hub id; default: the task's own model."""
    data: str | None = None
    """Someone's data (.jsonl, .json, .parquet or a hub id) instead of our own samples; see docs/data.md."""
    task: Literal["sorting", "bfcl"] = "sorting"
    """Where prompts, demonstrations and rewards come from without --data: the toy, or function calling."""
    reward: str | None = None
    """exact, sorting, bfcl or module:function(row, completion) -> float; default: the task's own."""
    baseline: Literal["none", "group_mean"] = "none"
    """What is taken off an answer's last reward; the mean of its prompt's answers does not move the optimum."""
    output_dir: Path | None = None
    """Where everything is written; default: runs/COMMAND."""
    seed: int = 0
    """Of data order, sampling and the embedded model."""
    resume: bool = False
    """Go on with the run in the output directory."""
    mesh: str | None = None
    """Devices by axis, such as fsdp=4,tensor=2; default: all devices on fsdp."""
    batch_size: int = 32
    """Prompts (with all their answers), pairs or demonstrations of one update."""
    epochs: float = 2.0
    """Passes over the buffer."""
    microbatches: int = 1
    """Slices of a batch that are run one after the other to save memory."""
    row_length: int = 4096
    """Tokens of a packed row at most; a larger group of answers is split and its prompt repeated."""
    save_every: int = 100
    """Updates between checkpoints."""
    keep: int = 2
    """How many of the latest checkpoints to keep, besides the best."""
    optimizer: Optimizer = Optimizer()
    precision: Precision = Precision()
    warm_start: WarmStart = WarmStart()
    collection: Collection = Collection()
    evaluation: Evaluation = Evaluation()
    loss: Any = NoOptions()

    command: ClassVar[str] = ""
    objective: ClassVar[str] = ""

    def __post_init__(self):
        _at_least(self, seed=0, batch_size=1, epochs=0, microbatches=1, save_every=1, keep=1, row_length=2)
        if self.baseline != "none" and (self.objective != "shiq" or self.loss.gamma != 1):
            raise ValueError(
                "a baseline leaves the optimum as it is for ShiQ with gamma 1 only: leave baseline at none"
            )

    def directory(self) -> Path:
        """The output directory."""
        return Path(self.output_dir) if self.output_dir else Path("runs") / self.command

    def settings(self) -> dict[str, Any]:
        """All options that determine the result, as JSON values."""
        values = dataclasses.asdict(self)
        for name in ("resume", "output_dir"):
            values.pop(name)
        if self.data and Path(self.data).is_file():
            with open(self.data, "rb") as file:
                values["data_digest"] = hashlib.file_digest(file, "sha256").hexdigest()
        return {"command": self.command, "objective": self.objective} | values
