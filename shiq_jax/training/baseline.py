"""Rewards measured from what a prompt's answers earn on average."""

from __future__ import annotations

import dataclasses

import numpy as np

from shiq_jax.errors import UserError
from shiq_jax.replay import Buffer, Record


class GroupMeanBaseline:
    """The buffer's records, each with the mean return of its group taken off the reward of its last action.

    With gamma = 1 a constant per prompt on the last reward leaves the optimal policy as it is and moves only the value
    of the prompt, which the logits then need not learn; the buffer itself keeps the raw rewards.

    Raises:
        UserError: no group has two answers, so that nothing would be left of the rewards.
    """

    def __init__(self, buffer: Buffer):
        self._buffer = buffer
        _, members = np.unique(buffer.group_ids(), return_inverse=True)
        if len(buffer) and np.bincount(members).max() == 1:
            raise UserError(
                f"every prompt of {buffer.path} has one answer, whose mean is itself, so nothing would be left to "
                "learn: use --baseline none"
            )
        means = np.bincount(members, buffer.returns()) / np.bincount(members)
        self.means = means[members]

    def __getitem__(self, index: int) -> Record:
        record = self._buffer[index]
        rewards = record.rewards.copy()
        rewards[-1] -= self.means[index]
        return dataclasses.replace(record, rewards=rewards)
