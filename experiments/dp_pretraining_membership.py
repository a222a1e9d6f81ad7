"""Membership inference from the loss (arXiv 1709.01604), measured as an AUC."""

from __future__ import annotations

import functools
import math
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Float

from experiments import source_code

if TYPE_CHECKING:
    from experiments.dp_pretraining import Arm, Experiment, Plan


class Attack(NamedTuple):
    """AUC of a membership attack; 0.5 is chance.

    Attributes:
        auc: probability that a member has a lower loss than a non-member.
        error: standard error of Hanley and McNeil (1982).
    """

    auc: float
    error: float

    @property
    def significant(self) -> bool:
        """Whether the AUC exceeds 0.5 by more than two standard errors."""
        return self.auc - 0.5 > 2 * self.error


def attack(members: Float[np.ndarray, " members"], nonmembers: Float[np.ndarray, " nonmembers"]) -> Attack:
    """Threshold attack on losses: sequences below the threshold are classified as members."""
    num_members, num_nonmembers = len(members), len(nonmembers)
    # Ties count one half.
    ranks = (np.searchsorted(np.sort(nonmembers), members, side) for side in ("left", "right"))
    auc = 1 - float(sum(rank.mean() for rank in ranks)) / (2 * num_nonmembers)
    # Q1 and Q2 of Hanley and McNeil for exponential scores.
    q1, q2 = auc / (2 - auc), 2 * auc**2 / (1 + auc)
    variance = auc * (1 - auc) + (num_members - 1) * (q1 - auc**2) + (num_nonmembers - 1) * (q2 - auc**2)
    return Attack(auc, math.sqrt(variance / (num_members * num_nonmembers)))


class Attacks:
    """Membership attacks on trained arms; members are the private sequences that were in a batch.

    Args:
        experiment: the experiment whose arms are trained.
        rates: learning rates of the arms.
        baseline: arm without private data.
        factor: maximum number of sequences per class, relative to `held_out`.
    """

    def __init__(self, experiment: Experiment, rates: dict, baseline: Arm, factor: int):
        self.experiment, self.rates, self.baseline, self.factor = experiment, rates, baseline, factor

    def measure(self, name: str, arm: Arm, seed: int) -> dict[str, Any]:
        """Train an arm and attack it.

        Returns:
            Attacks by the loss (`loss`) and by its difference from the baseline arm (`difference`) against non-members
            of the same files, by the loss against sequences of held-out files (`held_out`), and their settings.
        """
        start, plan, baseline = time.monotonic(), self.experiment.plan(arm), self._baseline_params(seed)
        params = baseline if arm == self.baseline else self._train(name, arm, plan, seed)
        parts = *self.split(arm, plan, seed), self._held_out_files
        members, nonmembers, held_out = (self.experiment.losses_per_sequence(params, part) for part in parts)
        # The baseline's loss calibrates for the difficulty of a sequence (arXiv 2111.08440).
        baseline_members, baseline_nonmembers = (
            self.experiment.losses_per_sequence(baseline, part) for part in parts[:2]
        )
        return {
            "loss": attack(members, nonmembers)._asdict(),
            "difference": attack(members - baseline_members, nonmembers - baseline_nonmembers)._asdict(),
            "held_out": attack(members, held_out)._asdict(),
            "sequences": [len(part) for part in parts],
            "mean_losses": [float(losses.mean()) for losses in (members, nonmembers, held_out)],
            "units": len(plan.private),
            "steps": plan.steps,
            "seconds": round(time.monotonic() - start, 1),
            "noise_multiplier": plan.mechanism and plan.mechanism.noise_multiplier,
        }

    def split(self, arm: Arm, plan: Plan, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Random members and non-members among the private sequences; a random split for the baseline arm."""
        private, rng = self.experiment.text.private, np.random.default_rng(seed)
        if arm == self.baseline:
            parts = np.array_split(rng.permutation(len(private)), 2)
        else:
            indices = self.experiment.unit_indices(len(plan.private), plan.mechanism, seed)
            used = np.unique(np.concatenate([indices(step) for step in range(plan.steps)]))
            parts = [rng.permutation(part) for part in _split_indices(private, plan.private[used])]
        limit = self.factor * self.experiment.scale.held_out
        return tuple(private[part[:limit]] for part in parts)

    def _train(self, name: str, arm: Arm, plan: Plan, seed: int) -> Any:
        for _, state in self.experiment.states(name, arm, plan, seed, self.rates):
            pass
        return state.trainable

    @functools.cache
    def _baseline_params(self, seed: int) -> Any:
        return self._train("without private data", self.baseline, self.experiment.plan(self.baseline), seed)

    @functools.cached_property
    def _held_out_files(self) -> np.ndarray:
        """More sequences of held-out files than the experiment itself uses."""
        pool, scale = self.experiment.pool, self.experiment.scale
        return source_code.load(pool, scale.private, self.factor * scale.held_out).private_held_out


def _split_indices(sequences: np.ndarray, members: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the sequences that are members, and of the others; sequences are distinct."""
    member_bytes = {member.tobytes() for member in members}
    is_member = np.array([sequence.tobytes() in member_bytes for sequence in sequences])
    return np.flatnonzero(is_member), np.flatnonzero(~is_member)
