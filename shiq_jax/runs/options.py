"""The options of a run, grouped as the command line shows them."""

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
from shiq_jax.runs.loss_options import SftLoss, given_as
from shiq_jax.runs.private_options import Privacy
from shiq_jax.runs.public_options import Public
from shiq_jax.training.optimizers import Optimizer

# Version of the run directory; runs of another version are not resumed.
FORMAT = 2


def _at_least(options: Any, **smallest: float) -> None:
    """ValueError naming the first option that is smaller than it may be, or not a finite number."""
    for name, least in smallest.items():
        if not least <= getattr(options, name) < math.inf:
            raise ValueError(f"{name} must be at least {least} and finite, not {getattr(options, name)}")


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class WarmStart:
    """A few supervised updates on demonstrations, before anything is sampled, make the reference."""

    steps: int = 0
    """Updates; 0 starts from the model unchanged."""
    batch_size: int = 32
    """Demonstrations of an update."""
    demonstrations: int = 2048
    """Maximum number of demonstrations."""
    optimizer: Optimizer = Optimizer(learning_rate=2e-3, schedule="cosine")

    def __post_init__(self):
        _at_least(self, steps=0, batch_size=1, demonstrations=1)


@dataclass(frozen=True)
class Collection:
    """What is sampled from the policy into the replay buffer."""

    prompts: int = 512
    """Prompts of the training split."""
    samples_per_prompt: int = 4
    """Answers to each prompt."""
    prompts_per_batch: int = 128
    """Prompts whose answers are scored and stored together."""
    prompts_in_flight: int = 32
    """Prompts that the sampler works on at once."""
    sampling: Sampling = Sampling()

    def __post_init__(self):
        _at_least(self, prompts=1, samples_per_prompt=1, prompts_per_batch=1, prompts_in_flight=1)


@dataclass(frozen=True)
class Evaluation:
    """Fresh temperature-1 samples on held-out prompts."""

    data: Annotated[str | None, given_as("FILE|HUB_ID", "the task's held-out split, or the data's own prompts")] = None
    """Prompts to evaluate on: rows with `prompt` and what the reward needs."""
    prompts: int = 128
    """Maximum number of prompts."""
    samples_per_prompt: int = 4
    """Samples of each prompt."""
    prompts_in_flight: int = 32
    """Prompts that the sampler works on at once."""
    max_tokens: int = 64
    """Longest completion, in tokens."""
    times: int = 4
    """Evaluations per round, evenly spread; the last one comes after the last update."""
    greedy: bool = True
    """Also decode greedily."""

    def __post_init__(self):
        _at_least(self, prompts=1, samples_per_prompt=1, prompts_in_flight=1, max_tokens=1, times=0)


@dataclass(frozen=True)
class Rounds:
    """How rounds of sampling and learning follow each other."""

    reference: Literal["first", "previous"] = "first"
    """The reference of the loss: the policy before the first round, or the one that the round samples from."""


@dataclass(frozen=True)
class Adapters:
    """LoRA: train a low-rank addition to the layers' linear maps, and freeze the model."""

    rank: Annotated[int | None, given_as("RANK", "none: all parameters learn")] = None
    """Rank of the additions; turns LoRA on."""
    alpha: Annotated[float | None, given_as("ALPHA", "twice the rank")] = None
    """The additions are multiplied by alpha / rank."""
    targets: tuple[Literal[TARGETS], ...] = TARGETS
    """Linear maps that have adapters."""

    def __post_init__(self):
        object.__setattr__(self, "targets", tuple(self.targets))
        if self.rank is None and (self.alpha is not None or self.targets != TARGETS):
            raise ValueError("alpha and targets say how adapters are: give their rank, or leave both out")
        self.configured()

    def configured(self) -> Lora | None:
        """The adapters; None without LoRA."""
        if self.rank is None:
            return None
        return Lora(self.rank, 2.0 * self.rank if self.alpha is None else self.alpha, self.targets)


@dataclass(frozen=True)
class Precision:
    """Arithmetic and memory of the forward pass."""

    compute: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the model's layers; parameters, statistics and losses are always float32."""
    remat: Literal["none", "full", "dots"] = "none"
    """What is recomputed in the backward pass instead of stored."""
    attention: Literal["xla", "flash"] = "xla"
    """Engine: plain XLA, or a Pallas kernel for GPU and TPU, which has been timed on neither."""


@dataclass(frozen=True)
class Job:
    """Options of every training command."""

    model: Annotated[str | None, given_as("DIR|HUB_ID", "the task's own")] = None
    """Model to train: a directory in Hugging Face format or a hub id, of the Llama family or Qwen3."""
    data: Annotated[str | None, given_as("FILE|HUB_ID", "none: sample answers and score them")] = None
    """Learn from these rows (.jsonl, .json, .parquet, hub id) or replay buffer without sampling; see docs/data.md."""
    prompts: Annotated[str | None, given_as("FILE|HUB_ID", "the task's own")] = None
    """Sample answers to these prompts and score them with --reward."""
    task: Literal["sorting", "bfcl"] = "sorting"
    """Without --data and --prompts: where prompts and rewards come from, the toy or function calling."""
    reward: Annotated[str | None, given_as("NAME", "the task's own")] = None
    """exact, sorting, bfcl or module:function(row, completion) -> float; it also scores data that have no scores."""
    score: Annotated[str | None, given_as("FIELD", "see docs/data.md")] = None
    """Field of the data that holds the scores."""
    drop_longer_than: Annotated[int | None, given_as("TOKENS", "refuse what exceeds the context")] = None
    """Leave out longer sequences of the data."""
    baseline: Literal["none", "group_mean"] = "none"
    """Subtracted from an answer's last reward; the mean of its prompt's answers does not move the optimum."""
    rounds: int = 1
    """Number of rounds of sampling, scoring and learning."""
    epochs: float = 2.0
    """Passes over the buffer of a round."""
    batch_size: int = 32
    """Prompts (with all their answers), pairs, kto's answers, or demonstrations of one update."""
    seed: int = 0
    """Seed of data order, sampling and the embedded model."""
    output_dir: Annotated[Path | None, given_as("DIR", "runs/COMMAND")] = None
    """Directory of everything that is written; see docs/run-directory.md."""
    resume: bool = False
    """Continue the run in the output directory, with the same options."""
    track: Annotated[tuple[Literal["tensorboard", "wandb"], ...], given_as("{tensorboard,wandb} ...", "neither")] = ()
    """Show the metrics elsewhere as well; metrics.jsonl is always written."""
    save_every: int = 100
    """Updates between checkpoints."""
    keep: int = 2
    """Number of latest checkpoints to keep, besides the best."""
    mesh: Annotated[str | None, given_as("AXIS=N,...", "all devices on fsdp")] = None
    """Devices by axis (replica, fsdp, tensor), such as fsdp=4,tensor=2."""
    microbatches: int = 1
    """Slices of a batch that are run one after the other to save memory."""
    row_length: int = 4096
    """Maximum tokens of a packed row; a larger group of answers is split and its prompt repeated."""
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
        _at_least(self, seed=0, batch_size=1, epochs=0, rounds=1, microbatches=1, save_every=1, keep=1, row_length=2)
        if self.rounds > 1 and (self.data is not None or self.objective == "sft"):
            what = "data are given once" if self.data is not None else "sft learns from demonstrations"
            raise ValueError(f"rounds sample from the policy, but {what}: leave rounds out")
        if self.rounds == 1 and self.round != Rounds():
            raise ValueError("round.reference names the reference of several rounds: give rounds, or leave it out")
        if self.data is not None and self.prompts is not None:
            raise ValueError("data and prompts exclude each other: give one of them")
        if self.data is None and (self.score is not None or self.drop_longer_than is not None):
            raise ValueError("score and drop_longer_than say how data are read: give data, or leave them out")
        if self.score is not None and self.objective == "sft":
            raise ValueError("sft imitates and reads no scores: leave score out")
        if self.drop_longer_than is not None:
            _at_least(self, drop_longer_than=2)
        if self.lora.rank is not None and not self.loss.configured().policy:
            raise ValueError(f"the loss {self.loss.name} leaves the policy as it is: leave lora out")
        if self.public.data is None and self.public != Public():
            raise ValueError("options of public data have no effect without them: give public.data, or leave them out")
        if self.public.data is not None and not self.privacy.on:
            raise ValueError("public data belong to a private run: give privacy.epsilon, or learn from them with data")
        if self.public.data is not None and self.optimizer.name != "adamw":
            raise ValueError(f"public data go with adamw, whose memory they leave behind, not {self.optimizer.name}")
        if self.baseline != "none" and (self.objective != "shiq" or self.loss.gamma not in (None, 1)):
            raise ValueError("a baseline keeps the optimum of ShiQ with gamma 1 only: leave baseline at none")

    def directory(self) -> Path:
        """The output directory."""
        return Path(self.output_dir) if self.output_dir else Path("runs") / self.command

    def settings(self) -> dict[str, Any]:
        """All options that determine the result, as JSON values, with digests of the files that are read.

        It reads every data file: call it once per run.
        """
        values = dataclasses.asdict(self) | {"loss": self.loss.settings()}
        for name in ("resume", "output_dir", "track"):
            values.pop(name)
        sources = {
            "data": self.data, "prompts": self.prompts, "evaluation_data": self.evaluation.data,
            "public_data": self.public.data,
        }  # fmt: skip
        for name, source in sources.items():
            if digests := [_digest(file) for file in matching_files(source or "")]:
                values[f"{name}_digest"] = ",".join(digests)
        if self.data and is_buffer(self.data):
            values["data_digest"] = _digest(Path(self.data) / "manifest.json")
        return {"format": FORMAT, "command": self.command, "objective": self.objective} | values

    def public_settings(self, settings: dict[str, Any]) -> dict[str, Any]:
        """The settings that checkpoints and trackers show; without the digest of private data, which would allow a
        membership test."""
        hidden = ("data_digest",) if self.privacy.on else ()
        return {name: value for name, value in settings.items() if name not in hidden}
