"""Options of a run, grouped as on the command line."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from shiq_jax.data.files import matching_files
from shiq_jax.models.lora import TARGETS, Lora
from shiq_jax.replay import is_buffer
from shiq_jax.rollout.sampling import Sampling
from shiq_jax.runs.loss_options import SftLoss, optional_arg
from shiq_jax.runs.private_options import Privacy
from shiq_jax.runs.public_options import Public
from shiq_jax.training.optimizers import Optimizer

# Version of the run directory; runs of other versions cannot be resumed.
FORMAT = 2


def _check_at_least(options: Any, **minimums: float) -> None:
    """Raise ValueError for the first option that is below its minimum or not finite."""
    for name, minimum in minimums.items():
        if not minimum <= getattr(options, name) < math.inf:
            raise ValueError(f"{name} must be at least {minimum} and finite, not {getattr(options, name)}")


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class WarmStart:
    """Supervised updates on demonstrations before sampling; the resulting policy is the reference."""

    steps: int = 0
    """Number of updates; 0 skips the warm start."""
    batch_size: int = 32
    """Demonstrations per update."""
    demonstrations: int = 2048
    """Maximum number of demonstrations."""
    optimizer: Optimizer = Optimizer(learning_rate=2e-3, schedule="cosine")

    def __post_init__(self):
        _check_at_least(self, steps=0, batch_size=1, demonstrations=1)


@dataclass(frozen=True)
class Collection:
    """Sampling of answers from the policy into the replay buffer."""

    prompts: int = 512
    """Number of prompts of the training split."""
    samples_per_prompt: int = 4
    """Sampled answers per prompt."""
    prompts_per_batch: int = 128
    """Prompts whose answers are scored and stored together."""
    prompts_in_flight: int = 32
    """Prompts that are decoded concurrently."""
    sampling: Sampling = Sampling()

    def __post_init__(self):
        _check_at_least(self, prompts=1, samples_per_prompt=1, prompts_per_batch=1, prompts_in_flight=1)


@dataclass(frozen=True)
class Evaluation:
    """Evaluation on held-out prompts with samples at temperature 1."""

    data: Annotated[
        str | None, optional_arg("FILE|HUB_ID", "the task's held-out split, or the prompts of the training data")
    ] = None
    """Evaluation prompts: rows with `prompt` and the fields that the reward needs."""
    prompts: int = 128
    """Maximum number of prompts."""
    samples_per_prompt: int = 4
    """Samples per prompt."""
    prompts_in_flight: int = 32
    """Prompts that are decoded concurrently."""
    max_tokens: int = 64
    """Maximum number of tokens of a completion."""
    times: int = 4
    """Evaluations per round, evenly spaced, the last one after the last update."""
    greedy: bool = True
    """Also evaluate greedy decoding."""

    def __post_init__(self):
        _check_at_least(self, prompts=1, samples_per_prompt=1, prompts_in_flight=1, max_tokens=1, times=0)


@dataclass(frozen=True)
class Rounds:
    """Rounds of sampling and training."""

    reference: Literal["first", "previous"] = "first"
    """Reference of the loss: the policy before the first round, or the policy that the current round samples from."""


@dataclass(frozen=True)
class Adapters:
    """LoRA: train low-rank adapters of the linear layers and freeze the model."""

    rank: Annotated[int | None, optional_arg("RANK", "none: train all parameters")] = None
    """Rank of the adapters; enables LoRA."""
    alpha: Annotated[float | None, optional_arg("ALPHA", "twice the rank")] = None
    """Scale of the adapters: their output is multiplied by alpha / rank."""
    targets: tuple[Literal[TARGETS], ...] = TARGETS
    """Linear layers that get adapters."""

    def __post_init__(self):
        object.__setattr__(self, "targets", tuple(self.targets))
        if self.rank is None and (self.alpha is not None or self.targets != TARGETS):
            raise ValueError("alpha and targets configure LoRA adapters: set lora.rank too, or omit both")
        self.build()

    def build(self) -> Lora | None:
        """The LoRA configuration; None without LoRA."""
        if self.rank is None:
            return None
        return Lora(self.rank, 2.0 * self.rank if self.alpha is None else self.alpha, self.targets)


@dataclass(frozen=True)
class Precision:
    """Precision, rematerialization and attention of the forward pass."""

    compute: Literal["float32", "bfloat16"] = "float32"
    """Compute dtype of the model's layers; parameters, token statistics and losses are always float32."""
    remat: Literal["none", "full", "dots"] = "none"
    """Rematerialization: none, full (recompute each layer) or dots (store only projections and attention outputs)."""
    attention: Literal["xla", "flash"] = "xla"
    """Attention implementation: XLA, or a Pallas flash-attention kernel for GPU and TPU (not benchmarked there)."""


@dataclass(frozen=True)
class Job:
    """Options of every training command."""

    model: Annotated[str | None, optional_arg("DIR|HUB_ID", "the task's model")] = None
    """Model to train: directory in Hugging Face format or hub id (Llama family or Qwen3)."""
    data: Annotated[str | None, optional_arg("FILE|HUB_ID", "none: sample and score answers")] = None
    """Train on this dataset (.jsonl, .json, .parquet, hub id or replay buffer) without sampling; see docs/data.md."""
    prompts: Annotated[str | None, optional_arg("FILE|HUB_ID", "the task's prompts")] = None
    """Prompts to sample answers for; the answers are scored with --reward."""
    task: Literal["sorting", "bfcl"] = "sorting"
    """Source of prompts and rewards without --data and --prompts: sorting (toy task) or bfcl (function calling)."""
    reward: Annotated[str | None, optional_arg("NAME", "the task's reward")] = None
    """Reward: exact, sorting, bfcl, or module:function(row, completion) -> float; also scores data without scores."""
    score: Annotated[str | None, optional_arg("FIELD", "see docs/data.md")] = None
    """Field of the data that holds the scores."""
    drop_longer_than: Annotated[int | None, optional_arg("TOKENS", "none: longer than the context is an error")] = None
    """Skip longer sequences of the data."""
    baseline: Literal["none", "group_mean"] = "none"
    """Baseline subtracted from the last reward: none, or the mean return of the prompt's answers."""
    rounds: int = 1
    """Number of rounds of sampling, scoring and training."""
    epochs: float = 2.0
    """Passes over the buffer per round."""
    batch_size: int = 32
    """Examples per update: prompts with all their answers, pairs, labeled answers (kto) or demonstrations (sft)."""
    seed: int = 0
    """Seed of data order, sampling and random initialization."""
    output_dir: Annotated[Path | None, optional_arg("DIR", "runs/COMMAND")] = None
    """Output directory; see docs/run-directory.md."""
    resume: bool = False
    """Resume the run in the output directory, with the same options."""
    track: Annotated[tuple[Literal["tensorboard", "wandb"], ...], optional_arg("{tensorboard,wandb} ...", "none")] = ()
    """Experiment trackers, in addition to metrics.jsonl."""
    save_every: int = 100
    """Updates between checkpoints."""
    keep: int = 2
    """Number of latest checkpoints to keep, in addition to the best."""
    mesh: Annotated[str | None, optional_arg("AXIS=N,...", "all devices on fsdp")] = None
    """Mesh shape by axis (replica, fsdp, tensor), for example fsdp=4,tensor=2."""
    microbatches: int = 1
    """Gradient accumulation: number of slices per batch, run sequentially to save memory."""
    row_length: int = 4096
    """Maximum number of tokens per packed row; a longer group of answers is split and its prompt repeated."""
    loss: Any = SftLoss()
    optimizer: Optimizer = Optimizer()
    collection: Collection = Collection()
    round: Rounds = Rounds()
    evaluation: Evaluation = Evaluation()
    warm_start: WarmStart = WarmStart()
    precision: Precision = Precision()
    lora: Adapters = Adapters()
    privacy: Privacy = Privacy()
    public: Public = Public()

    command: ClassVar[str] = ""
    objective: ClassVar[str] = ""

    def __post_init__(self):
        _check_at_least(
            self, seed=0, batch_size=1, epochs=0, rounds=1, microbatches=1, save_every=1, keep=1, row_length=2
        )
        if self.rounds > 1 and (self.data is not None or self.objective == "sft"):
            reason = "data is a fixed dataset" if self.data is not None else "sft trains on demonstrations"
            raise ValueError(f"rounds sample from the policy, but {reason}: omit rounds")
        if self.rounds == 1 and self.round != Rounds():
            raise ValueError("round.reference applies to several rounds: set rounds above 1, or omit round.reference")
        if self.data is not None and self.prompts is not None:
            raise ValueError("data and prompts are mutually exclusive: set only one of them")
        if self.data is None and (self.score is not None or self.drop_longer_than is not None):
            raise ValueError("score and drop_longer_than apply to data: set data too, or omit them")
        if self.score is not None and self.objective == "sft":
            raise ValueError("sft does not use scores: omit score")
        if self.drop_longer_than is not None:
            _check_at_least(self, drop_longer_than=2)
        if self.lora.rank is not None and not self.loss.build().trains_policy:
            raise ValueError(f"the loss {self.loss.name} does not train the policy, so LoRA has no effect: omit lora")
        if self.public.data is None and self.public != Public():
            raise ValueError("options of public data have no effect without public.data: set it, or omit them")
        if self.public.data is not None and not self.privacy.enabled:
            raise ValueError("public.data requires a private run: set privacy.epsilon, or train on it with data")
        if self.public.data is not None and self.optimizer.name != "adamw":
            raise ValueError(f"public.data requires the optimizer adamw, not {self.optimizer.name}")
        if self.baseline != "none" and (self.objective != "shiq" or self.loss.gamma not in (None, 1)):
            raise ValueError("a baseline preserves the optimum only for shiq with gamma 1: set baseline to none")

    def directory(self) -> Path:
        """The output directory."""
        return Path(self.output_dir) if self.output_dir else Path("runs") / self.command

    def settings(self) -> dict[str, Any]:
        """All options that determine the result, as JSON values, with digests of the data files.

        Hashes every data file, so call it once per run.
        """
        values = dataclasses.asdict(self) | {"loss": self.loss.settings()}
        for name in ("resume", "output_dir", "track"):
            values.pop(name)
        sources = {
            "data": self.data, "prompts": self.prompts, "evaluation_data": self.evaluation.data,
            "public_data": self.public.data,
        }  # fmt: skip
        for name, source in sources.items():
            if digests := [_sha256(file) for file in matching_files(source or "")]:
                values[f"{name}_digest"] = ",".join(digests)
        if self.data and is_buffer(self.data):
            values["data_digest"] = _sha256(Path(self.data) / "manifest.json")
        return {"format": FORMAT, "command": self.command, "objective": self.objective} | values

    def public_settings(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Settings for checkpoints and trackers; the digest of private data is omitted, since it leaks membership."""
        hidden = ("data_digest",) if self.privacy.enabled else ()
        return {name: value for name, value in settings.items() if name not in hidden}
