"""Batches of a private run: a Poisson sample of the units, each in a row of its own."""

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
from shiq_jax.training.placement import place

UNITS = ("example", "user")


def units_of(buffer: Buffer, unit: str, privacy_unit: str = "example") -> list[PackGroup]:
    """What is protected as a whole: for every unit its examples, which share a row.

    Args:
        buffer: the records.
        unit: what an example is: "trajectory", "pair" or "group".
        privacy_unit: "example", or "user" for all examples of a record's user.

    Raises:
        UserError: there is nothing, or a record that belongs to nobody where users are protected.
    """
    drawn = list(pack_groups(buffer, unit, share_prompts=unit != "trajectory"))
    if not drawn:
        raise UserError(f"{buffer.path} holds no {unit} to learn from")
    if privacy_unit == "example":
        return drawn
    users: dict[str, list[Members]] = {}
    for (example,) in drawn:
        names = {buffer[number].user for number in example}
        if None in names or len(names) > 1:
            owner = "nobody" if None in names else "two users"
            raise UserError(
                f"{buffer.path}: a {unit} (record {example[0]}) belongs to {owner}, but users are to be protected: "
                "give every row its user_id, or protect examples"
            )
        users.setdefault(names.pop(), []).append(example)
    return [tuple(owned) for owned in users.values()]


class PrivateBatches:
    """The batch of every step, drawn by a mechanism's sampler with a secret; places without a unit are masked.

    It says nothing of a batch: neither its tokens, nor its fill, nor its members. Its shape is that of all batches.

    Args:
        buffer: the records.
        units: see `units_of`.
        mechanism: gives the sampler; its data set must be these units.
        secret: of the run.
        references: by name, the statistics that fill `Example.references`.
        mesh: where the rows go.

    Raises:
        UserError: the mechanism was made for another number of units.
    """

    def __init__(
        self, buffer: Buffer, units: Sequence[PackGroup], mechanism: Mechanism, secret: Secret, *,
        references: References = NO_REFERENCES, mesh=None,
    ):  # fmt: skip
        if len(units) != mechanism.dataset_size:
            raise UserError(
                f"the privacy of this run is accounted for with {mechanism.dataset_size} units, but {buffer.path} "
                f"holds {len(units)}: restore the data that it was begun with, or begin another run"
            )
        self.records, self.references, self.mesh = buffer, references, mesh
        self.trees = Trees(buffer)
        self.units, self.mechanism, self.secret = units, mechanism, secret
        # A row has room for one unit, the longest, and for no more examples than a unit has.
        self.shape = plan(self.trees, units)._replace(slots=max(map(len, units)))

    left_out = 0

    def steps(self, epochs: float) -> int:
        """Updates in which every unit is drawn so many times on average."""
        return math.ceil(round(epochs * self.mechanism.dataset_size / self.mechanism.expected_batch, 9))

    def __call__(self, step: int) -> DeviceBatch:
        """The batch of an update step."""
        chosen, real = self.mechanism.sample(self.secret.sampling, step)
        rows = [
            pack([self.units[number]], self.trees, self.shape, references=self.references).batch for number in chosen
        ]
        batch = jax.tree.map(lambda *leaves: np.concatenate(leaves), *rows)
        batch = batch._replace(real=batch.real & real[:, None])
        return DeviceBatch(place(batch, self.mesh))
