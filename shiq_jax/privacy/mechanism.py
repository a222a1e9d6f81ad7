"""One object for all numbers of a private run: what is sampled, what noise is added, and what both cost."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import math
from typing import Literal

import numpy as np
from jaxtyping import Bool, Int64

from shiq_jax.errors import Refusal
from shiq_jax.privacy.rules import AutoS, ClipRule, Groupwise

Adjacency = Literal["zero_out", "replace_one"]
# Standard deviations above the mean size at which batches are cut; what is cut costs no epsilon to speak of.
HEADROOM = 6
# Steps of the privacy loss, always rounded up: the finer, the less is added to epsilon. Calibration looks many times.
_FINE, _COARSE = 1e-4, 1e-3
# Where calibration begins: least noise multipliers, of which the second takes an accountant minutes and is seldom
# needed, a first guess, and how near to the answer it ends.
_LEAST, _FIRST, _TOLERANCE = (0.3, 0.05), 1.0, 1e-3


@dataclasses.dataclass(frozen=True)
class Mechanism:
    """Truncated Poisson sampling and the Gaussian mechanism on a sum of clipped gradients, composed over steps.

    Sampler, noise, divisor and accounting event are derived from these fields and from nothing else, so that what is
    accounted for is what is done.

    Attributes:
        dataset_size: N, the number of units; public, and never recounted from private data.
        expected_batch: b, the mean size of a batch and what sums are divided by.
        steps: how many batches are released.
        noise_multiplier: sigma, the noise's standard deviation in units of the clip rule's sensitivity.
        delta: of (epsilon, delta).
        largest_batch: B, to which larger batches are cut at random; a multiple of what runs together.
        clip: the clip rule.
        adjacency: neighbours differ by one unit set to zero ("zero_out"), or by one unit in the place of another
            ("replace_one").
        unit: what a unit is, for the record: "trajectory", "pair", "group" or "user".
    """

    dataset_size: int
    expected_batch: float
    steps: int
    noise_multiplier: float
    delta: float
    largest_batch: int
    clip: ClipRule | Groupwise = AutoS()
    adjacency: Adjacency = "zero_out"
    unit: str = "trajectory"

    def __post_init__(self):
        if self.dataset_size < 1 or self.steps < 1:
            raise Refusal(
                f"a private run needs data and steps: dataset_size is {self.dataset_size}, steps {self.steps}"
            )
        if not 0 < self.expected_batch <= self.dataset_size:
            raise Refusal(f"an expected batch of {self.expected_batch} cannot be drawn from {self.dataset_size} units")
        if not 0 < self.delta < 1:
            raise Refusal(
                f"delta must lie in (0, 1), not {self.delta}; below 1 / {self.dataset_size} it means something"
            )
        if not 0 <= self.noise_multiplier < math.inf:
            raise Refusal(f"noise_multiplier must be finite and not negative, not {self.noise_multiplier}")
        if self.largest_batch < 1:
            raise Refusal(f"largest_batch must be at least 1, not {self.largest_batch}")
        if self.adjacency not in ("zero_out", "replace_one"):
            raise Refusal(f"adjacency must be zero_out or replace_one, not {self.adjacency!r}")

    @classmethod
    def sized(cls, *, dataset_size: int, expected_batch: float, multiple: int = 1, **fields) -> Mechanism:
        """The mechanism whose batches have six standard deviations of headroom; multiple: of which B is one."""
        largest = largest_batch(dataset_size, expected_batch, multiple)
        return cls(dataset_size=dataset_size, expected_batch=expected_batch, largest_batch=largest, **fields)

    @classmethod
    def calibrated(cls, *, epsilon: float, **fields) -> Mechanism:
        """As `sized`, with (within half a percent) the least noise with which all steps are (epsilon, delta)-private.

        Raises Refusal when no noise gives this epsilon, or one of the numbers makes no sense.
        """
        if not 0 < epsilon < math.inf:
            raise Refusal(f"epsilon must be positive and finite, not {epsilon}")
        found = cls.sized(noise_multiplier=_FIRST, **fields)
        return dataclasses.replace(found, noise_multiplier=found._calibrate(epsilon))

    @property
    def sampling_probability(self) -> float:
        """q, with which every unit is in a batch."""
        return self.expected_batch / self.dataset_size

    @property
    def noise_stddev(self) -> float:
        """Standard deviation of the noise in every coordinate of the sum."""
        return self.noise_multiplier * self.clip.sensitivity

    def event(self, steps: int | None = None):
        """What so many steps, by default all, are to an accountant of `dp_accounting`."""
        dp_accounting = _needed("dp_accounting")
        one = dp_accounting.TruncatedSubsampledGaussianDpEvent(
            self.dataset_size, self.sampling_probability, self.largest_batch, self.noise_multiplier
        )
        return dp_accounting.SelfComposedDpEvent(one, self.steps if steps is None else steps)

    def epsilon(self, steps: int | None = None) -> float:
        """What so many steps, by default all, cost at `delta`; infinite without noise."""
        return _epsilon(self, self.steps if steps is None else steps)

    def sample(self, key: bytes, step: int) -> tuple[Int64[np.ndarray, " B"], Bool[np.ndarray, " B"]]:
        """The units of a step's batch and which places hold one; a function of the secret key and the step alone.

        Places without a unit read number 0. See docs/privacy.md for what the generator is good for.
        """
        strategy = _needed("jax_privacy.batch_selection").CyclicPoissonSampling(
            self.sampling_probability, 1, self.largest_batch
        )
        generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([*key, 0, step])))
        (chosen,) = strategy.batch_iterator(self.dataset_size, generator)
        units, real = np.zeros(self.largest_batch, np.int64), np.arange(self.largest_batch) < len(chosen)
        units[: len(chosen)] = chosen
        return units, real

    def _calibrate(self, epsilon: float) -> float:
        dp_accounting = _needed("dp_accounting")

        def event(noise_multiplier: float):
            return dataclasses.replace(self, noise_multiplier=noise_multiplier).event()

        fresh, reason = functools.partial(_accountant, self.adjacency, _COARSE), None
        for least in _LEAST:
            bracket = dp_accounting.LowerEndpointAndGuess(least, _FIRST)
            try:
                return float(
                    dp_accounting.calibrate_dp_mechanism(fresh, event, epsilon, self.delta, bracket, tol=_TOLERANCE)
                )
            except Exception as error:
                reason = error
        raise Refusal(
            f"no noise was found that makes {self.steps} steps ({epsilon}, {self.delta})-private: ask for a larger "
            "epsilon or delta, fewer steps or smaller batches"
        ) from reason


def largest_batch(dataset_size: int, expected_batch: float, multiple: int = 1) -> int:
    """Places of a batch: six standard deviations above the mean, at most all units, up to a multiple."""
    q = min(expected_batch / dataset_size, 1)
    places = min(math.ceil(expected_batch + HEADROOM * math.sqrt(expected_batch * (1 - q))), dataset_size)
    return max(-(-places // multiple), 1) * multiple


@functools.lru_cache(maxsize=1024)
def _epsilon(mechanism: Mechanism, steps: int) -> float:
    if steps == 0:
        return 0.0
    return float(_accountant(mechanism.adjacency).compose(mechanism.event(steps)).get_epsilon(mechanism.delta))


def _accountant(adjacency: Adjacency, discretisation: float = _FINE):
    dp_accounting, pld = _needed("dp_accounting"), _needed("dp_accounting.pld")
    relation = {
        "zero_out": dp_accounting.NeighboringRelation.REPLACE_SPECIAL,
        "replace_one": dp_accounting.NeighboringRelation.REPLACE_ONE,
    }
    return pld.PLDAccountant(relation[adjacency], discretisation)


def _needed(module: str):
    """A module that private training alone needs."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Refusal(
            f"private training needs {module.partition('.')[0]}, which is not there: pip install 'shiq_jax[privacy]'"
        ) from error
