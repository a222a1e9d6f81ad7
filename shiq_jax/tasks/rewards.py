"""Registry of the built-in rewards."""

from __future__ import annotations

from collections.abc import Mapping

from shiq_jax.rollout import rewards
from shiq_jax.rollout.rewards import Reward, exact
from shiq_jax.tasks import bfcl_checker
from shiq_jax.tasks.sorting import sorting_reward

REWARDS: Mapping[str, Reward] = {"exact": exact, "sorting": sorting_reward, "bfcl": bfcl_checker.bfcl_reward}


def resolve(name: str) -> Reward:
    """The reward of a name in `REWARDS` or of "module:function"; see `rollout.rewards.resolve`.

    Raises:
        UserError: the reward does not exist, or a package that it needs is missing.
    """
    if name == "bfcl":
        # Load the official checker now, so that a missing package is reported before any sampling.
        bfcl_checker.load_official()
    return rewards.resolve(name, REWARDS)
