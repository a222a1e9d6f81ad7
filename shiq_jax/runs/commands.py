"""Training commands, their defaults, and detection of ignored options."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, ClassVar, Union

import tyro

from shiq_jax.rollout.sampling import Sampling
from shiq_jax.runs.loss_options import LabelLoss, PairLoss, RewardLoss, SftLoss, optional_arg
from shiq_jax.runs.options import Collection, Evaluation, Job, Precision, WarmStart
from shiq_jax.training.optimizers import Optimizer


@dataclass(frozen=True)
class Shiq(Job):
    """ShiQ (Q-learning on the logits), or another loss on scored answers."""

    command: ClassVar[str] = "shiq"
    objective: ClassVar[str] = "shiq"
    loss: RewardLoss = RewardLoss()


@dataclass(frozen=True)
class Dpo(Job):
    """DPO, or another loss on preference pairs."""

    command: ClassVar[str] = "dpo"
    objective: ClassVar[str] = "dpo"
    loss: PairLoss = PairLoss()


@dataclass(frozen=True)
class Kto(Job):
    """KTO, or another loss on answers labeled desirable or undesirable."""

    command: ClassVar[str] = "kto"
    objective: ClassVar[str] = "kto"
    loss: LabelLoss = LabelLoss()
    threshold: Annotated[float | None, optional_arg("REWARD", "mean reward of the prompt's answers")] = None
    """Label answers without labels by their reward: desirable above the threshold, undesirable below."""

    def __post_init__(self):
        super().__post_init__()
        if self.threshold is not None and not math.isfinite(self.threshold):
            raise ValueError(f"threshold must be finite, not {self.threshold}")


@dataclass(frozen=True)
class Sft(Job):
    """Supervised fine-tuning on demonstrations."""

    command: ClassVar[str] = "sft"
    objective: ClassVar[str] = "sft"
    loss: SftLoss = SftLoss()


@dataclass(frozen=True)
class ShiqBfcl(Shiq):
    """ShiQ on the Berkeley Function Calling Leaderboard, with SmolLM2-135M-Instruct."""

    command: ClassVar[str] = "shiq-bfcl"


@dataclass(frozen=True)
class ShiqUltraFeedback(Shiq):
    """ShiQ on UltraFeedback, or another dataset with scored answers."""

    command: ClassVar[str] = "shiq-ultrafeedback"


@dataclass(frozen=True)
class DpoUltraFeedback(Dpo):
    """DPO on the best and worst answers of UltraFeedback, or of other scored data."""

    command: ClassVar[str] = "dpo-ultrafeedback"


@dataclass(frozen=True)
class Inspect:
    """Show the stage, metrics and generations of a run, or a replay buffer."""

    path: tyro.conf.Positional[Path]
    """Directory of a run, or of a replay buffer, whose checksums are then verified."""
    generations: int = 3
    """Number of prompts whose generations are shown."""


def toy_defaults(job: Job) -> Job:
    """The job with defaults for the toy task: a tiny decoder trained from scratch."""
    optimizers = {
        "shiq": Optimizer(learning_rate=3e-4),
        "dpo": Optimizer(learning_rate=1e-4),
        "kto": Optimizer(learning_rate=3e-4),
        "sft": Optimizer(learning_rate=2e-3, schedule="cosine"),
    }
    return replace(
        job,
        warm_start=WarmStart(steps=200, batch_size=48, demonstrations=4096),
        collection=Collection(sampling=Sampling(max_tokens=16)),
        evaluation=Evaluation(max_tokens=16),
        optimizer=optimizers[job.objective],
    )


def function_calling_defaults(job: Job) -> Job:
    """The job with defaults for SmolLM2-135M on function calling, sized for two CPU cores."""
    return replace(
        job,
        task="bfcl",
        baseline="group_mean" if job.objective == "shiq" else "none",
        batch_size=4,
        save_every=10,
        precision=Precision(remat="dots"),
        warm_start=WarmStart(steps=40, batch_size=4, demonstrations=160, optimizer=Optimizer(learning_rate=5e-5)),
        collection=Collection(prompts=80, prompts_per_batch=40, prompts_in_flight=16, sampling=Sampling(max_tokens=96)),
        evaluation=Evaluation(prompts=48, samples_per_prompt=1, prompts_in_flight=32, max_tokens=96, times=1),
        optimizer=Optimizer(learning_rate=5e-5 if job.objective == "sft" else 1e-5),
    )


def pretrained_defaults(job: Job) -> Job:
    """The job with defaults for a pretrained model on external data."""
    return replace(
        job,
        batch_size=8,
        epochs=1.0,
        precision=Precision(remat="dots"),
        evaluation=Evaluation(prompts=64, samples_per_prompt=1, prompts_in_flight=32, max_tokens=256, times=1),
        optimizer=Optimizer(learning_rate=2e-5 if job.objective == "sft" else 1e-6),
    )


def ultrafeedback_defaults(job: Job) -> Job:
    """The job with defaults for a pretrained chat model on scored answers of very different lengths."""
    job = replace(pretrained_defaults(job), data="openbmb/UltraFeedback", drop_longer_than=2048)
    if job.objective == "shiq":
        return replace(job, baseline="group_mean", loss=RewardLoss(normalisation="mean_t"))
    return job


def subcommands(arguments: Sequence[str]):
    """The commands as a union type for tyro; their defaults depend on --data, --prompts and --task."""
    text = " ".join(arguments)
    defaults = toy_defaults
    if re.search(r"--(data|prompts)\b", text):
        defaults = pretrained_defaults
    elif re.search(r"--task[= ]bfcl\b", text):
        defaults = function_calling_defaults
    jobs = [defaults(Shiq()), defaults(Dpo()), defaults(Kto()), defaults(Sft())]
    bfcl_defaults = pretrained_defaults if defaults is pretrained_defaults else function_calling_defaults
    jobs.append(bfcl_defaults(ShiqBfcl()))
    jobs += [ultrafeedback_defaults(ShiqUltraFeedback()), ultrafeedback_defaults(DpoUltraFeedback())]
    commands = [
        Annotated[type(job), tyro.conf.subcommand(job.command, default=job, description=type(job).__doc__)]
        for job in jobs
    ]
    commands.append(Annotated[Inspect, tyro.conf.subcommand("inspect", description=Inspect.__doc__)])
    return Union[tuple(commands)]  # noqa: UP007


# Options, or groups of options, that are ignored with --data, and in sft.
_IGNORED_WITH_DATA = ("task", "collection", "warm_start")
_IGNORED_IN_SFT = (
    *(f"collection.{name}" for name in ("samples_per_prompt", "prompts_per_batch", "prompts_in_flight", "sampling")),
    *(f"warm_start.{name}" for name in ("steps", "batch_size", "optimizer")),
)


def ignored_options(job: Job) -> Iterator[str]:
    """Flags of options that differ from their defaults but have no effect on this job."""
    ignored = _IGNORED_WITH_DATA if job.data else _IGNORED_IN_SFT if job.objective == "sft" else ()
    if job.prompts:
        ignored = ("task", "warm_start")
    if job.data or job.prompts:
        set_defaults = pretrained_defaults
    else:
        set_defaults = function_calling_defaults if job.task == "bfcl" else toy_defaults
    defaults = dict(_flatten(set_defaults(type(job)())))
    for name, value in _flatten(job):
        if value != defaults[name] and any(f"{name}.".startswith(f"{group}.") for group in ignored):
            yield "--" + name.replace("_", "-")


def _flatten(options, prefix: str = "") -> Iterator[tuple[str, object]]:
    """(dotted name, value) of every option, nested groups included."""
    for field in fields(options):
        value = getattr(options, field.name)
        if is_dataclass(value):
            yield from _flatten(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, value
