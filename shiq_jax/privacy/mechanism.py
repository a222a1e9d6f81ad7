"""The mechanism of a private run: Poisson sampling, Gaussian noise and privacy accounting in one object."""

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
# Batches are truncated this many standard deviations above their mean size; this adds a negligible amount to epsilon.
HEADROOM_STDDEVS = 6
# Discretization intervals of the privacy loss distribution; discretization rounds epsilon up. Calibrate on the coarse
# grid; refine only if that wastes over 0.5% of the noise.
_FINE_GRID, _COARSE_GRID, _LESS_NOISE = 1e-4, 1e-3, 0.995
# Noise multipliers that bound the search. The smaller lower bound is tried second, because the accountant is slow at
# low noise multipliers. The search tolerance is relative to the lower end of the bracket.
_LOWER_BOUNDS, _INITIAL_NOISE, _UPPER_BOUND, _TOLERANCE = (0.3, 0.05), 1.0, 2.0**30, 1 / 300


@dataclasses.dataclass(frozen=True)
class Mechanism:
    """Gaussian mechanism on sums of clipped gradients over truncated Poisson samples, composed over steps.

    The sampler, the noise, the divisor and the accounting event are all derived from these fields, so the accounting
    matches the computation.

    Attributes:
        dataset_size: N, the number of units; public.
        expected_batch: b, the mean batch size, by which sums are divided.
        steps: number of private steps.
        noise_multiplier: sigma, the standard deviation of the noise over the sensitivity of the clip rule.
        delta: delta of the (epsilon, delta) guarantee.
        largest_batch: B, the size to which larger batches are truncated at random.
        clip: clip rule.
        adjacency: neighboring data sets differ in one unit, which is zeroed out ("zero_out"), replaced by another
            ("replace_one"), or present only in the larger one, of N units ("add_remove"). The last requires
            largest_batch >= N, because its accounting does not cover truncation.
        unit: unit of privacy, recorded in privacy.json: "trajectory", "pair", "group" or "user".
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
        _check_expected_batch(self.dataset_size, self.expected_batch)
        _check_positive_integers(steps=self.steps, largest_batch=self.largest_batch)
        if not 0 < self.delta < 1:
            raise UserError(
                f"delta must lie in (0, 1), not {self.delta}: choose one below 1 / {self.dataset_size}, the number of "
                "units"
            )
        if not 0 <= self.noise_multiplier < math.inf:
            raise UserError(f"noise_multiplier must be finite and at least 0, not {self.noise_multiplier}")
        if self.adjacency not in get_args(Adjacency):
            raise UserError(f"adjacency must be {' or '.join(get_args(Adjacency))}, not {self.adjacency!r}")
        if self.adjacency == "add_remove" and self.largest_batch < self.dataset_size:
            raise UserError(
                "the accounting of adjacency add_remove does not cover truncated batches: largest_batch must be at "
                f"least the dataset_size {self.dataset_size}, not {self.largest_batch}"
            )

    @classmethod
    def from_noise_multiplier(
        cls, *, noise_multiplier: float, dataset_size: int, expected_batch: float, multiple: int = 1, **fields
    ) -> Mechanism:
        """Create a mechanism that truncates batches six standard deviations above their mean size.

        Args:
            multiple: `largest_batch` is rounded up to a multiple of this, such as devices times microbatches.
        """
        return cls(
            dataset_size=dataset_size, expected_batch=expected_batch, noise_multiplier=noise_multiplier,
            largest_batch=default_largest_batch(dataset_size, expected_batch, multiple), **fields,
        )  # fmt: skip

    @classmethod
    def calibrated(cls, *, epsilon: float, **fields) -> Mechanism:
        """Create a mechanism with the least noise (within 0.5%) for which all steps are (epsilon, delta)-private.

        The other arguments are those of `from_noise_multiplier`.

        Raises:
            UserError: epsilon is out of reach (too small for any noise, or too large to need noise), or a number is
                invalid.
        """
        if not 0 < epsilon < math.inf:
            raise UserError(f"epsilon must be positive and finite, not {epsilon}")
        initial = cls.from_noise_multiplier(noise_multiplier=_INITIAL_NOISE, **fields)
        mechanism = initial._calibrate(epsilon, _COARSE_GRID)
        if mechanism is None or mechanism._wastes_noise(epsilon):
            mechanism = initial._calibrate(epsilon, _FINE_GRID)
        if mechanism is None:
            raise UserError(
                f"no noise_multiplier up to {_UPPER_BOUND:g} makes {initial.steps} steps ({epsilon}, {initial.delta})-"
                "private: choose a larger epsilon or delta, fewer steps or smaller batches"
            )
        return mechanism

    @property
    def sampling_probability(self) -> float:
        """q, the probability that a unit is in a batch."""
        return self.expected_batch / self.dataset_size

    @property
    def noise_stddev(self) -> float:
        """Standard deviation of the noise in every coordinate of the sum."""
        return self.noise_multiplier * self.clip.sensitivity

    def event(self, steps: int | None = None):
        """The `dp_accounting` event of the given number of steps, by default all."""
        dp_accounting = _require("dp_accounting")
        if self.adjacency == "add_remove":
            noise = dp_accounting.GaussianDpEvent(self.noise_multiplier)
            step_event = dp_accounting.PoissonSampledDpEvent(self.sampling_probability, noise)
        else:
            step_event = dp_accounting.TruncatedSubsampledGaussianDpEvent(
                self.dataset_size, self.sampling_probability, self.largest_batch, self.noise_multiplier
            )
        return dp_accounting.SelfComposedDpEvent(step_event, self.steps if steps is None else steps)

    def epsilon(self, steps: int | None = None) -> float:
        """Epsilon at `delta` after the given number of steps, by default all; infinite without noise."""
        return _epsilon(self, self.steps if steps is None else steps)

    def sample(self, key: bytes, step: int) -> tuple[Int64[np.ndarray, " B"], Bool[np.ndarray, " B"]]:
        """Sample the batch of a step: indices of units, and a mask that is True where an index is a sampled unit.

        A deterministic function of the secret key and the step. Padding has index 0. For the quality of the random
        numbers see docs/privacy.md.
        """
        strategy = _require("jax_privacy.batch_selection").CyclicPoissonSampling(
            self.sampling_probability, 1, self.largest_batch
        )
        generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([*key, 0, step])))
        (sampled,) = strategy.batch_iterator(self.dataset_size, generator)
        units, mask = np.zeros(self.largest_batch, np.int64), np.arange(self.largest_batch) < len(sampled)
        units[: len(sampled)] = sampled
        return units, mask

    def _wastes_noise(self, epsilon: float) -> bool:
        """Whether 0.5% less noise also satisfies epsilon."""
        # Epsilon falls at least as fast as noise grows, so the first comparison rules out most cases cheaply.
        less_noise = dataclasses.replace(self, noise_multiplier=_LESS_NOISE * self.noise_multiplier)
        return self.epsilon() < _LESS_NOISE * epsilon and less_noise.epsilon() <= epsilon

    @functools.lru_cache(maxsize=64)
    def _calibrate(self, epsilon: float, discretization: float) -> Mechanism | None:
        """This mechanism with the least noise for `epsilon`; None if no noise is enough."""
        dp_accounting = _require("dp_accounting")
        make_accountant = functools.partial(_accountant, self.adjacency, discretization)

        def make_event(noise_multiplier: float):
            return dataclasses.replace(self, noise_multiplier=noise_multiplier).event()

        @functools.cache
        def exceeds_epsilon(noise_multiplier: float) -> bool:
            return make_accountant().compose(make_event(noise_multiplier)).get_epsilon(self.delta) > epsilon

        upper = _INITIAL_NOISE
        if exceeds_epsilon(upper):
            if exceeds_epsilon(_UPPER_BOUND):
                return None
            gap = upper - _LOWER_BOUNDS[0]
            while exceeds_epsilon(upper):
                gap *= 2
                lower, upper = upper, upper + gap
        else:
            for lower in _LOWER_BOUNDS:
                if exceeds_epsilon(lower):
                    break
                upper = lower
            else:
                raise UserError(
                    f"{self.steps} steps with a noise_multiplier of only {upper} spend less than epsilon {epsilon}: "
                    "choose a smaller epsilon, or give the noise_multiplier instead"
                )
        bracket = dp_accounting.ExplicitBracketInterval(lower, upper)
        tolerance = min(lower, _LOWER_BOUNDS[0]) * _TOLERANCE
        noise_multiplier = dp_accounting.calibrate_dp_mechanism(
            make_accountant, make_event, epsilon, self.delta, bracket, tol=tolerance
        )
        return dataclasses.replace(self, noise_multiplier=float(noise_multiplier))


def default_largest_batch(dataset_size: int, expected_batch: float, multiple: int = 1) -> int:
    """Six standard deviations above the mean batch size, at most all units, rounded up to a multiple.

    Raises UserError if the expected batch cannot be sampled.
    """
    _check_expected_batch(dataset_size, expected_batch)
    _check_positive_integers(multiple=multiple)
    q = expected_batch / dataset_size
    size = min(math.ceil(expected_batch + HEADROOM_STDDEVS * math.sqrt(expected_batch * (1 - q))), dataset_size)
    return max(-(-size // multiple), 1) * multiple


def _check_expected_batch(dataset_size: int, expected_batch: float) -> None:
    _check_positive_integers(dataset_size=dataset_size)
    if not 0 < expected_batch <= dataset_size:
        raise UserError(f"expected_batch must lie in (0, {dataset_size}], the number of units, not {expected_batch}")


def _check_positive_integers(**numbers: int) -> None:
    for name, value in numbers.items():
        if not (value >= 1 and value % 1 == 0):
            raise UserError(f"{name} must be a positive integer, not {value}")


@functools.lru_cache(maxsize=1024)
def _epsilon(mechanism: Mechanism, steps: int) -> float:
    if steps == 0:
        return 0.0
    return float(_accountant(mechanism.adjacency).compose(mechanism.event(steps)).get_epsilon(mechanism.delta))


def _accountant(adjacency: Adjacency, discretization: float = _FINE_GRID):
    dp_accounting, pld = _require("dp_accounting"), _require("dp_accounting.pld")
    relation = {
        "zero_out": dp_accounting.NeighboringRelation.REPLACE_SPECIAL,
        "replace_one": dp_accounting.NeighboringRelation.REPLACE_ONE,
        "add_remove": dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE,
    }
    return pld.PLDAccountant(relation[adjacency], discretization)


def _require(module: str):
    """Import a module that the extra `privacy` installs; UserError if it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"private training needs {module.partition('.')[0]}, which is not installed: "
            "pip install 'shiq_jax[privacy]'"
        ) from error
