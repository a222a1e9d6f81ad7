"""Worker of this library: update steps on the groups of a workload in one setting. Started by `throughput`."""

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

# The reference's statistics are computed once and reused in this many epochs.
EPOCHS = 3


def main(model: str, path: str, remat: str, objective: str) -> None:
    """Warm up and serve steps.

    Args:
        model: a Hugging Face directory.
        path: a workload file written by `workloads.write`.
        remat: `none`, `dots` or `full`.
        objective: `dpo` or `shiq`.
    """
    steps = json.loads(Path(path).read_text())
    decoder, params = load_hf(model, remat=remat)
    with tempfile.TemporaryDirectory() as directory:
        buffer = annotated_buffer(Path(directory) / "buffer", model, decoder, params, steps)
        records, options = buffer.read(range(len(buffer))), {"prompts_per_batch": len(steps[0])}
        record_statistics(decoder, params, records, **options)
        start = time.perf_counter()
        record_statistics(decoder, params, records, **options)
        annotation = (time.perf_counter() - start) / len(steps) / EPOCHS
        load_batch, state, update = training_setup(decoder, params, buffer, objective, len(steps[0]))
        batches = [load_batch(number) for number in range(len(steps))]
        executed = [flops.executed_flops(update, state, item.batch) for item in batches]
        needed = [_needed_flops(decoder.config, item.batch) for item in batches]
        for item in {item.batch.tokens.shape: item for item in batches}.values():
            for _ in range(2):
                state, _ = update(state, item.batch)
        jax.block_until_ready(state)
        schedule = itertools.cycle(enumerate(batches))

        def step() -> dict:
            nonlocal state
            number, item = next(schedule)
            state, metrics = update(state, item.batch)
            jax.block_until_ready((state, metrics))
            return {"step": number}

        serving.serve(
            step, annotation_seconds=annotation, executed_flops=float(np.median(executed)),
            needed_flops=float(np.median(needed)), tokens=float(np.mean([item.tokens for item in batches])),
            fill=float(np.mean([item.fill for item in batches])),
            rows=str([item.batch.tokens.shape for item in batches]),
        )  # fmt: skip


def annotated_buffer(path: Path, model: str, decoder: Model, params, steps: list) -> Buffer:
    """A buffer of all groups of a workload, with the model itself as the reference."""
    buffer = Buffer.create(path)
    buffer.append(list(itertools.chain(*(group_records(number, group) for number, group in enumerate(sum(steps, []))))))
    Reference(model, lambda _: (decoder, params)).annotate(buffer)
    return buffer


def training_setup(decoder: Model, params, buffer: Buffer, objective: str, groups: int):
    """Batches of `groups` groups, the initial state (which takes ownership of `params`) and the update step."""
    loss = OBJECTIVES[objective]
    statistics = buffer.statistics(reference_identity(decoder, params))
    batches = Batches(buffer, loss.unit, groups, seed=0, references={"reference": statistics})
    optimizer = Optimizer(learning_rate=1e-6, schedule="constant").build(1000)
    state = init_state(decoder, params, optimizer)
    return batches, state, make_update(decoder, loss, optimizer)


def group_records(number: int, group: dict) -> list[Record]:
    """Records of one group; rewards decrease along its completions, which are ordered from best to worst."""
    prompt, records = group["prompt"], []
    for rank, answer in enumerate(group["answers"]):
        rewards = np.zeros(len(answer), np.float32)
        # Distinct rewards give every pair of neighbors a winner.
        rewards[-1] = len(group["answers"]) - rank
        mask = np.arange(len(prompt) + len(answer)) >= len(prompt)
        records.append(Record(tokens=prompt + answer, action_mask=mask, rewards=rewards, group=str(number)))
    return records


def _needed_flops(config, batch) -> float:
    """FLOPs needed by the real tokens and actions of a batch."""
    intervals, gather = np.asarray(batch.intervals), np.asarray(batch.gather)
    tokens = attended = 0
    for enter, exit_, sequences in zip(intervals[..., 0], intervals[..., 1], (gather >= 0).any(-1).sum((1, 2))):
        # Sequences of a row are numbered from 0; padding has a larger `enter` than all of them.
        length = int((enter < sequences).sum())
        tokens += length
        query = enter[:length]
        visible = (enter[None, :length] <= query[:, None]) & (query[:, None] < exit_[None, :length])
        attended += int(np.tril(visible).sum())
    actions = sum(len(set(row[row >= 0].tolist())) for row in gather.reshape(len(gather), -1))
    return flops.needed_flops(config, tokens, actions, attended)


if __name__ == "__main__":
    main(*sys.argv[1:])
