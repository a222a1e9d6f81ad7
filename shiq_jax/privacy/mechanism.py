"""One object for all numbers of a private run: what is sampled, what noise is added, and what both cost."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import math
from typing import Literal, get_args

import numpy as np
from jaxtyping import Bool, Int64

from shiq_jax.errors import UserError
from shiq_jax.privacy.clip_rules import AutoS, ClipRule, Groupwise

Adjacency = Literal["zero_out", "replace_one", "add_remove"]
# Standard deviations above the mean size at which batches are cut; what is cut costs no epsilon to speak of.
HEADROOM = 6
# Steps of the privacy loss, always rounded up: the finer, the less is added to epsilon. Calibration looks many times,
# and takes the coarse ones, unless it shows that with them this part of the noise would have been enough.
_FINE, _COARSE, _ALMOST = 1e-4, 1e-3, 0.995
# Between which noise multipliers calibration looks, and where it begins: of the least, the second takes an accountant
# long and is seldom needed. It ends as near to the answer as this part of the one that it took.
_LEAST, _FIRST, _MOST, _TOLERANCE = (0.3, 0.05), 1.0, 2.0**30, 1 / 300


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
            ("replace_one"); or, where no batch can be cut, by one unit that only the larger of them has, whose number
            is N ("add_remove").
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
        _check_drawn(self.dataset_size, self.expected_batch)
        _check_whole(steps=self.steps, largest_batch=self.largest_batch)
        if not 0 < self.delta < 1:
            raise UserError(
                f"delta must lie in (0, 1), not {self.delta}; below 1 / {self.dataset_size} it means something"
            )
        if not 0 <= self.noise_multiplier < math.inf:
            raise UserError(f"noise_multiplier must be finite and not negative, not {self.noise_multiplier}")
        if self.adjacency not in get_args(Adjacency):
            raise UserError(f"adjacency must be {' or '.join(get_args(Adjacency))}, not {self.adjacency!r}")
        if self.adjacency == "add_remove" and self.largest_batch < self.dataset_size:
            raise UserError(
                "adjacency add_remove is accounted for where no batch is cut: largest_batch must be at least the "
                f"dataset_size {self.dataset_size}, not {self.largest_batch}"
            )

    @classmethod
    def sized(cls, *, dataset_size: int, expected_batch: float, multiple: int = 1, **fields) -> Mechanism:
        """The mechanism whose batches have six standard deviations of headroom; multiple: of which B is one."""
        largest = largest_batch(dataset_size, expected_batch, multiple)
        return cls(dataset_size=dataset_size, expected_batch=expected_batch, largest_batch=largest, **fields)

    @classmethod
    def calibrated(cls, *, epsilon: float, **fields) -> Mechanism:
        """As `sized`, with (within half a percent) the least noise with which all steps are (epsilon, delta)-private.

        Raises UserError when no noise gives this epsilon, next to none does, or one of the numbers makes no sense.
        """
        if not 0 < epsilon < math.inf:
            raise UserError(f"epsilon must be positive and finite, not {epsilon}")
        first = cls.sized(noise_multiplier=_FIRST, **fields)
        found = first._calibrated(epsilon, _COARSE)
        if found is None or found._wasteful(epsilon):
            found = first._calibrated(epsilon, _FINE)
        if found is None:
            raise UserError(
                f"no noise was found that makes {first.steps} steps ({epsilon}, {first.delta})-private: ask for a "
                "larger epsilon or delta, fewer steps or smaller batches"
            )
        return found

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
        if self.adjacency == "add_remove":
            noise = dp_accounting.GaussianDpEvent(self.noise_multiplier)
            one = dp_accounting.PoissonSampledDpEvent(self.sampling_probability, noise)
        else:
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

    def _wasteful(self, epsilon: float) -> bool:
        """Whether almost as much noise is enough; epsilon falls at least as fast as noise grows, so one look may do."""
        less = dataclasses.replace(self, noise_multiplier=_ALMOST * self.noise_multiplier)
        return self.epsilon() < _ALMOST * epsilon and less.epsilon() <= epsilon

    @functools.lru_cache(maxsize=64)
    def _calibrated(self, epsilon: float, discretisation: float) -> Mechanism | None:
        """The same with the noise that these steps of the privacy loss find; None where no noise is enough."""
        dp_accounting = _needed("dp_accounting")
        fresh = functools.partial(_accountant, self.adjacency, discretisation)

        def event(noise_multiplier: float):
            return dataclasses.replace(self, noise_multiplier=noise_multiplier).event()

        @functools.cache
        def too_little(noise_multiplier: float) -> bool:
            return fresh().compose(event(noise_multiplier)).get_epsilon(self.delta) > epsilon

        upper = _FIRST
        if too_little(upper):
            if too_little(_MOST):
                return None
            gap = upper - _LEAST[0]
            while too_little(upper):
                gap *= 2
                lower, upper = upper, upper + gap
        else:
            for lower in _LEAST:
                if too_little(lower):
                    break
                upper = lower
            else:
                raise UserError(
                    f"{self.steps} steps with next to no noise, a noise_multiplier of {upper}, cost less than the "
                    f"epsilon {epsilon}: ask for a smaller epsilon, or give the noise_multiplier in its place"
                )
        bracket = dp_accounting.ExplicitBracketInterval(lower, upper)
        tolerance = min(lower, _LEAST[0]) * _TOLERANCE
        found = dp_accounting.calibrate_dp_mechanism(fresh, event, epsilon, self.delta, bracket, tol=tolerance)
        return dataclasses.replace(self, noise_multiplier=float(found))


def largest_batch(dataset_size: int, expected_batch: float, multiple: int = 1) -> int:
    """Places of a batch: six standard deviations above the mean, at most all units, up to a multiple.

    Raises UserError when such a batch cannot be drawn.
    """
    _check_drawn(dataset_size, expected_batch)
    _check_whole(multiple=multiple)
    q = expected_batch / dataset_size
    places = min(math.ceil(expected_batch + HEADROOM * math.sqrt(expected_batch * (1 - q))), dataset_size)
    return max(-(-places // multiple), 1) * multiple


def _check_drawn(dataset_size: int, expected_batch: float) -> None:
    _check_whole(dataset_size=dataset_size)
    if not 0 < expected_batch <= dataset_size:
        raise UserError(f"an expected batch of {expected_batch} cannot be drawn from {dataset_size} units")


def _check_whole(**numbers: int) -> None:
    for name, value in numbers.items():
        if not (value >= 1 and value % 1 == 0):
            raise UserError(f"{name} must be a whole number of at least 1, not {value}")


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
        "add_remove": dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE,
    }
    return pld.PLDAccountant(relation[adjacency], discretisation)


def _needed(module: str):
    """A module that private training alone needs."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"private training needs {module.partition('.')[0]}, which is not there: pip install 'shiq_jax[privacy]'"
        ) from error
