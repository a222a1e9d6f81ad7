"""Whether a loss tells what a model has learned from: the membership inference of arXiv 1709.01604, as an AUC."""

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
    """How often a member's loss is below a non-member's; 0.5 is chance.

    Attributes:
        auc: the area under the curve of true against false positives, over all thresholds.
        error: its standard error, of Hanley and McNeil (1982).
    """

    auc: float
    error: float

    @property
    def decided(self) -> bool:
        """Whether it is above chance by more than two standard errors."""
        return self.auc - 0.5 > 2 * self.error


def attack(members: Float[np.ndarray, " members"], others: Float[np.ndarray, " others"]) -> Attack:
    """The attack that calls a member whatever has a loss below a threshold."""
    here, there = len(members), len(others)
    # Where both are equal, half of the pair.
    below = (np.searchsorted(np.sort(others), members, side) for side in ("left", "right"))
    auc = 1 - float(sum(each.mean() for each in below)) / (2 * there)
    # How often two members are both below a non-member, and a member below two of those, for exponential scores.
    two, both = auc / (2 - auc), 2 * auc**2 / (1 + auc)
    spread = auc * (1 - auc) + (here - 1) * (two - auc**2) + (there - 1) * (both - auc**2)
    return Attack(auc, math.sqrt(spread / (here * there)))


class Attacks:
    """On models that are trained for it: members are the private sequences that were drawn.

    Args:
        experiment: whose arms are trained.
        rates: of their steps.
        outsider: the arm that knows of no private data.
        times: how many times as many sequences of a kind are looked at, at most, as the experiment holds out.
    """

    def __init__(self, experiment: Experiment, rates: dict, outsider: Arm, times: int):
        self.experiment, self.rates, self.outsider, self.times = experiment, rates, outsider, times

    def measure(self, name: str, arm: Arm, seed: int) -> dict[str, Any]:
        """Of an arm attacks by its loss: against private sequences of the same files, and against files held out.

        `difference` is that by how far the loss is below that of a model without private data.
        """
        began, plan, outsider = time.monotonic(), self.experiment.plan(arm), self._without(seed)
        params = outsider if arm == self.outsider else self._trained(name, arm, plan, seed)
        sides = *self.sides(arm, plan, seed), self._apart
        here, there, apart = (self.experiment.each(params, side) for side in sides)
        # A text that is hard for whoever does not know it is no sign (arXiv 2111.08440).
        known, unknown, _ = (self.experiment.each(outsider, side) for side in sides)
        return {
            "loss": attack(here, there)._asdict(), "difference": attack(here - known, there - unknown)._asdict(),
            "held_out": attack(here, apart)._asdict(), "sequences": [len(side) for side in sides],
            "mean_losses": [float(each.mean()) for each in (here, there, apart)], "units": len(plan.private),
            "steps": plan.steps, "seconds": round(time.monotonic() - began, 1),
            "noise_multiplier": plan.mechanism and plan.mechanism.noise_multiplier,
        }  # fmt: skip

    def sides(self, arm: Arm, plan: Plan, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Private sequences that were drawn, and that were not, at random; of an arm that draws none, any."""
        every, rng = self.experiment.text.private, np.random.default_rng(seed)
        if arm == self.outsider:
            parts = np.array_split(rng.permutation(len(every)), 2)
        else:
            numbers = self.experiment.numbers(len(plan.private), plan.mechanism, seed)
            drawn = np.unique(np.concatenate([numbers(step) for step in range(plan.steps)]))
            parts = [rng.permutation(part) for part in _found(every, plan.private[drawn])]
        most = self.times * self.experiment.scale.held_out
        return tuple(every[part[:most]] for part in parts)

    def _trained(self, name: str, arm: Arm, plan: Plan, seed: int) -> Any:
        for _, state in self.experiment.states(name, arm, plan, seed, self.rates):
            pass
        return state.trainable

    @functools.cache
    def _without(self, seed: int) -> Any:
        return self._trained("without private data", self.outsider, self.experiment.plan(self.outsider), seed)

    @functools.cached_property
    def _apart(self) -> np.ndarray:
        """Of the files that are held out, as are those of the experiment, which are too few."""
        at = self.experiment
        return source_code.load(at.pool, at.scale.private, self.times * at.scale.held_out).private_held_out


def _found(every: np.ndarray, some: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the sequences that are among some, and of those that are not; no sequence stands twice."""
    known = {each.tobytes() for each in some}
    among = np.array([each.tobytes() in known for each in every])
    return np.flatnonzero(among), np.flatnonzero(~among)
