"""Packed batches of a buffer as a function of (seed, step), and a thread that makes them one step ahead."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from shiq_jax.errors import UserError
from shiq_jax.replay import NO_REFERENCES, Buffer, References, Schedule, Trees, pack, pack_groups, plan
from shiq_jax.training.placement import data_devices, place


class DeviceBatch(NamedTuple):
    """One batch on its devices, with what the host wants to know of it.

    Attributes:
        batch: what the update takes.
        members: int[rows, slots, K], record numbers, -1 where there is none; None where batches have no records, and in
            private runs.
        tokens: real tokens, each shared prompt counted once; None where unknown, and in private runs.
        fill: part of the row positions that hold real tokens; None as `tokens`.
    """

    batch: Any
    members: np.ndarray | None = None
    tokens: int | None = None
    fill: float | None = None


def prefetch(batches: Callable[[int], DeviceBatch], start: int, stop: int) -> Iterator[tuple[DeviceBatch, float]]:
    """The batches of steps `start` to `stop - 1`, each made in a thread while the one before it is used.

    Yields pairs of a batch and the seconds that the caller had to wait for it.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="batches") as worker:
        following = worker.submit(batches, start) if start < stop else None
        for step in range(start, stop):
            began = time.perf_counter()
            current = following.result()
            waited = time.perf_counter() - began
            following = worker.submit(batches, step + 1) if step + 1 < stop else None
            yield current, waited


class Batches:
    """Batches for passes over a buffer.

    Args:
        buffer: the records.
        unit: what an example is: "trajectory", "pair" or "group".
        batch_size: pack_groups of a step: prompts with their sampled answers, pairs, or demonstrations.
        seed: of the order; the batch of step t is a function of (seed, t) alone.
        references: by name, the statistics that fill `Example.references`.
        mesh: where the rows go.
        microbatches: the rows are filled up to a multiple of this and of the data devices.
        row_length: groups of trajectories of more tokens are split, their prompt repeated.
        records: what to pack under the buffer's record numbers, when it is not the buffer's records themselves.
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
                f"{buffer.path} holds no {unit} to learn from: pairs need two answers of one prompt with unlike rewards"
            )
        # A batch larger than the buffer would hold some of it several times.
        batch_size = min(batch_size, len(self.pack_groups))
        self.schedule = Schedule(len(self.pack_groups), batch_size, seed)
        self.rows_multiple = microbatches * data_devices(mesh)
        self.shape = plan(self.trees, self.pack_groups, batch_size=batch_size, rows_multiple=self.rows_multiple)

    @property
    def left_out(self) -> int:
        """How many groups give no example: pairs need two answers of unlike reward."""
        return self.pack_groups.left_out

    def steps(self, epochs: float) -> int:
        """Updates in so many passes over the buffer."""
        return self.schedule.steps(epochs)

    def __call__(self, step: int) -> DeviceBatch:
        """The batch of an update step."""
        chosen = [self.pack_groups[number] for number in self.schedule.indices(step)]
        packed = pack(chosen, self.trees, self.shape, references=self.references, rows_multiple=self.rows_multiple)
        tokens = round(packed.fill * packed.batch.tokens.size)
        return DeviceBatch(place(packed.batch, self.mesh), packed.members, tokens, packed.fill)
