"""Our contestant: update steps on a work's groups, in one setting. Run by `throughput`."""

from __future__ import annotations

import itertools
import json
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from benchmarks import flops, serving
from shiq_jax.models import Model, load_hf
from shiq_jax.objectives import OBJECTIVES
from shiq_jax.replay import Buffer, Record
from shiq_jax.training.annotation import record_statistics, reference_identity
from shiq_jax.training.batches import Batches
from shiq_jax.training.optimizers import Optimizer
from shiq_jax.training.reference import Reference
from shiq_jax.training.state import init_state
from shiq_jax.training.update import make_update

# The statistics of the reference are made once and read in so many passes.
EPOCHS = 3


def main(model: str, work: str, remat: str, objective: str) -> None:
    """Warms up and serves.

    Args:
        model: a Hugging Face directory.
        work: a file of `works.write`.
        remat: `none`, `dots` or `full`.
        objective: `dpo` or `shiq`.
    """
    steps = json.loads(Path(work).read_text())
    decoder, params = load_hf(model, remat=remat)
    with tempfile.TemporaryDirectory() as directory:
        buffer = filled(Path(directory) / "buffer", model, decoder, params, steps)
        records, options = buffer.read(range(len(buffer))), {"prompts_per_batch": len(steps[0])}
        record_statistics(decoder, params, records, **options)
        began = time.perf_counter()
        record_statistics(decoder, params, records, **options)
        annotation = (time.perf_counter() - began) / len(steps) / EPOCHS
        batches, state, update = training(decoder, params, buffer, objective, len(steps[0]))
        ready = [batches(number) for number in range(len(steps))]
        executed = [flops.executed(update, state, step.batch) for step in ready]
        needed = [_needed(decoder.config, step.batch) for step in ready]
        for step in {step.batch.tokens.shape: step for step in ready}.values():
            for _ in range(2):
                state, _ = update(state, step.batch)
        jax.block_until_ready(state)
        turns = itertools.cycle(enumerate(ready))

        def one() -> dict:
            nonlocal state
            number, step = next(turns)
            state, metrics = update(state, step.batch)
            jax.block_until_ready((state, metrics))
            return {"step": number}

        serving.serve(
            one, annotation_seconds=annotation, executed_flops=float(np.median(executed)),
            needed_flops=float(np.median(needed)), tokens=float(np.mean([step.tokens for step in ready])),
            fill=float(np.mean([step.fill for step in ready])), rows=str([step.batch.tokens.shape for step in ready]),
        )  # fmt: skip


def filled(path: Path, model: str, decoder: Model, params, steps: list) -> Buffer:
    """A buffer of a work's groups, annotated by the model itself."""
    buffer = Buffer.create(path)
    buffer.append(list(itertools.chain(*(records_of(number, group) for number, group in enumerate(sum(steps, []))))))
    Reference(model, lambda _: (decoder, params)).annotate(buffer)
    return buffer


def training(decoder: Model, params, buffer: Buffer, objective: str, groups: int):
    """Batches of so many groups, the state, which takes the parameters over, and the update step."""
    chosen = OBJECTIVES[objective]
    statistics = buffer.statistics(reference_identity(decoder, params))
    batches = Batches(buffer, chosen.unit, groups, seed=0, references={"reference": statistics})
    rule = Optimizer(learning_rate=1e-6, schedule="constant").build(1000)
    state = init_state(decoder, params, rule)
    return batches, state, make_update(decoder, chosen, rule)


def records_of(number: int, group: dict) -> list[Record]:
    """The records of a group; its better answers, which come first, get more reward."""
    prompt, found = group["prompt"], []
    for place, answer in enumerate(group["answers"]):
        rewards = np.zeros(len(answer), np.float32)
        # Better answers first: every pair of neighbours has a winner.
        rewards[-1] = len(group["answers"]) - place
        mask = np.arange(len(prompt) + len(answer)) >= len(prompt)
        found.append(Record(tokens=prompt + answer, action_mask=mask, rewards=rewards, group=str(number)))
    return found


def _needed(config, batch) -> float:
    """Operations of the tokens and actions that are there, by the interval rule."""
    intervals, gather = np.asarray(batch.intervals), np.asarray(batch.gather)
    tokens = attended = 0
    for enter, exit_, sequences in zip(intervals[..., 0], intervals[..., 1], (gather >= 0).any(-1).sum((1, 2))):
        # Sequences of a row are numbered from 0, and padding enters after the last of them.
        kept = int((enter < sequences).sum())
        tokens += kept
        query = enter[:kept]
        sees = (enter[None, :kept] <= query[:, None]) & (query[:, None] < exit_[None, :kept])
        attended += int(np.tril(sees).sum())
    distinct = sum(len(set(row[row >= 0].tolist())) for row in gather.reshape(len(gather), -1))
    return flops.needed(config, tokens, distinct, attended)


if __name__ == "__main__":
    main(*sys.argv[1:])
