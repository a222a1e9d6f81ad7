"""Train: `python train.py` runs the embedded default; `python train.py --help` lists the rest."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, ClassVar, Union

import tyro

from shiq_jax.errors import Refusal
from shiq_jax.rollout.generate import Sampling
from shiq_jax.training.config import Collection, DpoLoss, Evaluation, Job, NoOptions, Precision, ShiqLoss, WarmStart
from shiq_jax.training.optimizers import Optimizer


@dataclass(frozen=True)
class Shiq(Job):
    """Q-learning on the logits: sample from a policy, score, keep, and learn offline token by token."""

    command: ClassVar[str] = "shiq"
    objective: ClassVar[str] = "shiq"
    loss: ShiqLoss = ShiqLoss()


@dataclass(frozen=True)
class Dpo(Job):
    """Direct preference optimisation: on prompt/chosen/rejected data, or on the best and worst of our own samples."""

    command: ClassVar[str] = "dpo"
    objective: ClassVar[str] = "dpo"
    loss: DpoLoss = DpoLoss()


@dataclass(frozen=True)
class Sft(Job):
    """Supervised fine-tuning on demonstrations."""

    command: ClassVar[str] = "sft"
    objective: ClassVar[str] = "sft"
    loss: NoOptions = NoOptions()


@dataclass(frozen=True)
class ShiqBfcl(Shiq):
    """ShiQ on function calling: SmolLM2-135M-Instruct on the Berkeley Function Calling Leaderboard."""

    command: ClassVar[str] = "shiq-bfcl"


@dataclass(frozen=True)
class Inspect:
    """Show what a replay buffer holds, after holding every file against its checksum."""

    buffer: tyro.conf.Positional[Path]
    """Directory of the buffer."""


def embedded(job: Job) -> Job:
    """The job with defaults for the toy task: a tiny decoder from scratch."""
    optimizers = {
        "shiq": Optimizer(learning_rate=3e-4),
        "dpo": Optimizer(learning_rate=1e-4),
        "sft": Optimizer(learning_rate=2e-3, schedule="cosine"),
    }
    return replace(
        job,
        warm_start=WarmStart(steps=200, batch_size=48, demonstrations=4096),
        collection=Collection(sampling=Sampling(max_tokens=16)),
        evaluation=Evaluation(max_tokens=16),
        optimizer=optimizers[job.objective],
    )


def function_calling(job: Job) -> Job:
    """The job with defaults for SmolLM2-135M on function calling, small enough for two CPU cores."""
    return replace(
        job,
        task="bfcl",
        baseline="group_mean" if job.objective == "shiq" else "none",
        batch_size=4,
        save_every=10,
        precision=Precision(remat="dots"),
        warm_start=WarmStart(steps=40, batch_size=4, demonstrations=160, optimizer=Optimizer(learning_rate=5e-5)),
        collection=Collection(prompts=80, prompts_per_batch=8, sampling=Sampling(max_tokens=96)),
        evaluation=Evaluation(prompts=48, samples_per_prompt=1, prompts_per_batch=16, max_tokens=96, times=1),
        optimizer=Optimizer(learning_rate=5e-5 if job.objective == "sft" else 1e-5),
    )


def own_data(job: Job) -> Job:
    """The job with defaults for a pretrained model on somebody's data."""
    return replace(
        job,
        batch_size=8,
        epochs=1.0,
        precision=Precision(remat="dots"),
        evaluation=Evaluation(prompts=64, samples_per_prompt=1, prompts_per_batch=16, max_tokens=256, times=1),
        optimizer=Optimizer(learning_rate=2e-5 if job.objective == "sft" else 1e-6),
    )


def command_line(arguments: Sequence[str]):
    """The commands as a type for tyro, with the defaults that fit what the arguments are about."""
    given = " ".join(arguments)
    defaults = embedded
    if re.search(r"--data\b", given):
        defaults = own_data
    elif re.search(r"--task[= ]bfcl\b", given):
        defaults = function_calling
    jobs = [defaults(Shiq()), defaults(Dpo()), defaults(Sft())]
    jobs.append(own_data(ShiqBfcl()) if defaults is own_data else function_calling(ShiqBfcl()))
    kinds = [
        Annotated[type(job), tyro.conf.subcommand(job.command, default=job, description=type(job).__doc__)]
        for job in jobs
    ]
    return Union[(*kinds, Annotated[Inspect, tyro.conf.subcommand("inspect", description=Inspect.__doc__)])]  # noqa: UP007


def run(command) -> None:
    """Carry out a parsed command."""
    if isinstance(command, Inspect):
        from shiq_jax.replay import Buffer

        print(Buffer.open(command.buffer).report())
        return
    from shiq_jax.training.pipeline import train

    train(command)


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line, run the command, and turn a refusal into one sentence and exit code 2."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help")):
        arguments = ["shiq", *arguments]
    command = tyro.cli(command_line(arguments), args=arguments, description=__doc__)
    try:
        run(command)
    except Refusal as refusal:
        print(f"train.py: {refusal}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("train.py: interrupted; the same command with --resume goes on", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
