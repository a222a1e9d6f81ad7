"""Reward baselines."""

from __future__ import annotations

import dataclasses

import numpy as np

from shiq_jax.errors import UserError
from shiq_jax.replay import Buffer, Record


class GroupMeanBaseline:
    """View of a buffer's records with the group's mean return subtracted from the reward of the last action.

    With gamma = 1 a constant per prompt on the last reward does not change the optimal policy. It removes the prompt's
    value from what the logits must learn. The buffer keeps the raw rewards.

    Raises:
        UserError: every group has a single answer, so that all rewards would become 0.
    """

    def __init__(self, buffer: Buffer):
        self._buffer = buffer
        _, group_index = np.unique(buffer.group_ids(), return_inverse=True)
        if len(buffer) and np.bincount(group_index).max() == 1:
            raise UserError(
                f"every prompt of {buffer.path} has a single answer, so a group-mean baseline would set all rewards to "
                "0: use --baseline none"
            )
        means = np.bincount(group_index, buffer.returns()) / np.bincount(group_index)
        self.means = means[group_index]

    def __getitem__(self, index: int) -> Record:
        record = self._buffer[index]
        rewards = record.rewards.copy()
        rewards[-1] -= self.means[index]
        return dataclasses.replace(record, rewards=rewards)
