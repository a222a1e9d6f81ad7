"""Packed batches of a buffer as a function of (seed, step), prefetched one step ahead in a thread."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from shiq_jax.errors import UserError
from shiq_jax.replay import NO_REFERENCES, Buffer, References, Schedule, Trees, pack, pack_groups, plan
from shiq_jax.training.placement import data_parallel_size, shard_batch


class DeviceBatch(NamedTuple):
    """A batch on its devices, with host-side metadata.

    Attributes:
        batch: argument of the update.
        members: int[rows, slots, K], record indices, -1 for padding; None for batches without records and in private
            runs.
        tokens: real tokens, each shared prompt counted once; None if unknown and in private runs.
        fill: fraction of the row positions that hold real tokens; None whenever `tokens` is.
    """

    batch: Any
    members: np.ndarray | None = None
    tokens: int | None = None
    fill: float | None = None


def prefetch(batches: Callable[[int], DeviceBatch], start: int, stop: int) -> Iterator[tuple[DeviceBatch, float]]:
    """Yield (batch, seconds waited for it) for steps `start` to `stop - 1`, loading one batch ahead in a thread."""
    with ThreadPoolExecutor(1, thread_name_prefix="batches") as worker:
        pending = worker.submit(batches, start) if start < stop else None
        for step in range(start, stop):
            start_time = time.perf_counter()
            batch = pending.result()
            wait_seconds = time.perf_counter() - start_time
            pending = worker.submit(batches, step + 1) if step + 1 < stop else None
            yield batch, wait_seconds


class Batches:
    """Batches for epochs over a buffer; `batches(step)` depends on the seed and the step alone.

    Args:
        buffer: the records.
        unit: unit of the examples: "trajectory", "pair" or "group".
        batch_size: pack groups per step: prompts with their sampled answers, pairs, or demonstrations.
        seed: of the order.
        references: name -> statistics, for `Example.references`.
        mesh: mesh over which the rows are sharded.
        microbatches: rows are padded to a multiple of `microbatches * data_parallel_size(mesh)`.
        row_length: groups of trajectories with more tokens are split, and each part repeats the prompt.
        records: replacement for the buffer's records, with the same indices; for example `GroupMeanBaseline`.
    """

    def __init__(
        self,
        buffer: Buffer,
        unit: str,
        batch_size: int,
        *,
        seed: int,
        references: References = NO_REFERENCES,
        mesh=None,
        microbatches: int = 1,
        row_length: int = 4096,
        records=None,
    ):
        self.records, self.references, self.mesh = buffer if records is None else records, references, mesh
        self.trees = Trees(self.records)
        self.pack_groups = pack_groups(buffer, unit, row_length=row_length)
        if not self.pack_groups:
            raise UserError(
                f"{buffer.path} holds no {unit} to train on: a pair needs two answers to one prompt with different "
                "rewards"
            )
        # A batch larger than the buffer would repeat records.
        batch_size = min(batch_size, len(self.pack_groups))
        self.schedule = Schedule(len(self.pack_groups), batch_size, seed)
        self.rows_multiple = microbatches * data_parallel_size(mesh)
        self.shape = plan(self.trees, self.pack_groups, batch_size=batch_size, rows_multiple=self.rows_multiple)

    @property
    def skipped(self) -> int:
        """Number of groups without an example: no two of their answers have different rewards."""
        return self.pack_groups.skipped

    def steps(self, epochs: float) -> int:
        """Number of updates in `epochs` epochs."""
        return self.schedule.steps(epochs)

    def __call__(self, step: int) -> DeviceBatch:
        """The batch of an update step."""
        step_groups = [self.pack_groups[index] for index in self.schedule.indices(step)]
        packed = pack(step_groups, self.trees, self.shape, references=self.references, rows_multiple=self.rows_multiple)
        tokens = round(packed.fill * packed.batch.tokens.size)
        return DeviceBatch(shard_batch(packed.batch, self.mesh), packed.members, tokens, packed.fill)
