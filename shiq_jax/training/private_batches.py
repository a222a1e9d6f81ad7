"""Batches of a private run: a Poisson sample of the units, one unit per row."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import numpy as np

from shiq_jax.errors import UserError
from shiq_jax.privacy import Mechanism
from shiq_jax.privacy.secret import Secret
from shiq_jax.replay import NO_REFERENCES, Buffer, References, Trees, pack, pack_groups, plan
from shiq_jax.replay.schedule import Members, PackGroup
from shiq_jax.training.batches import DeviceBatch
from shiq_jax.training.placement import shard_batch

UNITS = ("example", "user")


def privacy_units(buffer: Buffer, unit: str, privacy_unit: str = "example") -> list[PackGroup]:
    """The units of privacy, each as a pack group of its examples.

    Args:
        buffer: the records.
        unit: unit of the objective's examples: "trajectory", "pair" or "group".
        privacy_unit: "example", or "user" for all examples of one user.

    Raises:
        UserError: there is no example, or an example of a user-level run does not have exactly one user.
    """
    groups = list(pack_groups(buffer, unit, share_prompts=unit != "trajectory"))
    if not groups:
        raise UserError(f"{buffer.path} holds no {unit} to train on")
    if privacy_unit == "example":
        return groups
    users: dict[str, list[Members]] = {}
    for (example,) in groups:
        names = {buffer[index].user for index in example}
        if None in names or len(names) > 1:
            problem = "has no user" if None in names else "has records of several users"
            raise UserError(
                f"{buffer.path}: the {unit} of record {example[0]} {problem}, but user-level privacy needs exactly "
                "one: give every row its user_id, or use --privacy.unit example"
            )
        users.setdefault(names.pop(), []).append(example)
    return [tuple(examples) for examples in users.values()]


class PrivateBatches:
    """Batches sampled by a mechanism from a run's secret; rows without a unit are masked.

    All batches have the same shape, and their `DeviceBatch` has no members, tokens or fill, which would leak which
    units were sampled.

    Args:
        buffer: the records.
        units: see `privacy_units`.
        mechanism: samples the units; its `dataset_size` must be their number.
        secret: secret of the run.
        references: name -> statistics, for `Example.references`.
        mesh: mesh over which the rows are sharded.

    Raises:
        UserError: `mechanism.dataset_size` is not the number of units.
    """

    def __init__(
        self, buffer: Buffer, units: Sequence[PackGroup], mechanism: Mechanism, secret: Secret, *,
        references: References = NO_REFERENCES, mesh=None,
    ):  # fmt: skip
        if len(units) != mechanism.dataset_size:
            raise UserError(
                f"the privacy accounting of this run assumes {mechanism.dataset_size} units, but {buffer.path} holds "
                f"{len(units)}: restore the data that the run was started with, or start another run"
            )
        self.records, self.references, self.mesh = buffer, references, mesh
        self.trees = Trees(buffer)
        self.units, self.mechanism, self.secret = units, mechanism, secret
        # A row holds the largest unit.
        self.shape = plan(self.trees, units)._replace(slots=max(map(len, units)))

    skipped = 0

    def steps(self, epochs: float) -> int:
        """Number of updates in which every unit is sampled `epochs` times in expectation."""
        return math.ceil(round(epochs * self.mechanism.dataset_size / self.mechanism.expected_batch, 9))

    def __call__(self, step: int) -> DeviceBatch:
        """The batch of an update step."""
        indices, real = self.mechanism.sample(self.secret.sampling, step)
        rows = [
            pack([self.units[index]], self.trees, self.shape, references=self.references).batch for index in indices
        ]
        batch = jax.tree.map(lambda *leaves: np.concatenate(leaves), *rows)
        batch = batch._replace(real=batch.real & real[:, None])
        return DeviceBatch(shard_batch(batch, self.mesh))
