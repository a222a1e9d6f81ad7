"""Train: `python train.py` runs the embedded default; `python train.py --help` lists the rest."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Union

import tyro

from shiq_jax.errors import Refusal
from shiq_jax.rollout.generate import Sampling
from shiq_jax.training.config import Collection, DpoLoss, Evaluation, Job, NoOptions, Precision, ShiqLoss, WarmStart
from shiq_jax.training.optimizers import Optimizer

@dataclass(frozen=True)
class OnSamples(Job):
    """What learning from samples of the warm-started policy has in common; the defaults are those of the embedded task."""

    warm_start: WarmStart = WarmStart(steps=200, batch_size=48, demonstrations=4096)
    collection: Collection = Collection(sampling=Sampling(max_tokens=16))
    evaluation: Evaluation = Evaluation(max_tokens=16)
    optimizer: Optimizer = Optimizer(learning_rate=3e-4)


@dataclass(frozen=True)
class Shiq(OnSamples):
    """Q-learning on the logits: sample from a policy, score, keep, and learn offline token by token."""

    command: ClassVar[str] = "shiq"
    objective: ClassVar[str] = "shiq"
    loss: ShiqLoss = ShiqLoss()


@dataclass(frozen=True)
class Dpo(OnSamples):
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
    warm_start: WarmStart = WarmStart(demonstrations=4096)
    evaluation: Evaluation = Evaluation(max_tokens=16)
    optimizer: Optimizer = Optimizer(learning_rate=2e-3, schedule="cosine")


@dataclass(frozen=True)
class ShiqBfcl(Shiq):
    """ShiQ on function calling: SmolLM2-135M-Instruct on the Berkeley Function Calling Leaderboard."""

    command: ClassVar[str] = "shiq-bfcl"
    task: Literal["sorting", "bfcl"] = "bfcl"
    baseline: Literal["none", "group_mean"] = "group_mean"
    batch_size: int = 4
    precision: Precision = Precision(remat="dots")
    warm_start: WarmStart = WarmStart(40, batch_size=4, demonstrations=160, optimizer=Optimizer(learning_rate=5e-5))
    collection: Collection = Collection(prompts=80, prompts_per_batch=8, sampling=Sampling(max_tokens=96))
    evaluation: Evaluation = Evaluation(prompts=48, samples_per_prompt=1, prompts_per_batch=16, max_tokens=96, times=1)
    optimizer: Optimizer = Optimizer(learning_rate=1e-5)


@dataclass(frozen=True)
class Inspect:
    """Show what a replay buffer holds, after holding every file against its checksum."""

    buffer: tyro.conf.Positional[Path]
    """Directory of the buffer."""


JOBS = (Shiq(), Dpo(), Sft(), ShiqBfcl())
_NAMED = {job.command: job for job in JOBS} | {"inspect": tyro.MISSING}
_KINDS = (*map(type, JOBS), Inspect)
Command = Union[  # noqa: UP007 - built from values
    tuple(
        Annotated[kind, tyro.conf.subcommand(name, default=default, description=kind.__doc__)]
        for kind, (name, default) in zip(_KINDS, _NAMED.items(), strict=True)
    )
]


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
    command = tyro.cli(Command, args=arguments, description=__doc__)
    try:
        run(command)
    except Refusal as refusal:
        print(f"train.py: {refusal}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
