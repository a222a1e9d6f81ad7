"""Paired bootstrap intervals over questions and seeds."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float


class Interval(NamedTuple):
    """A mean and the ends of its 95% bootstrap interval."""

    mean: float
    low: float
    high: float


def interval(
    values: Float[np.ndarray, "seeds questions"], *, resamples: int = 10_000, level: float = 0.95, seed: int = 0
) -> Interval:
    """The percentile interval of the mean when both seeds and questions are drawn again, independently of each other.

    For a paired comparison, `values` are differences between two policies on the same question and seed. Drawing both
    factors again (Owen, 2007, the pigeonhole bootstrap) is conservative: its variance is never below that of the mean.

    Args:
        values: one number per seed and question.
        resamples: bootstrap samples.
        level: coverage.
        seed: of the draws.
    """
    seeds, questions = values.shape
    random = np.random.default_rng(seed)
    rows = random.multinomial(seeds, np.full(seeds, 1 / seeds), resamples) / seeds
    columns = random.multinomial(questions, np.full(questions, 1 / questions), resamples) / questions
    means = np.einsum("bs,sq,bq->b", rows, values, columns, optimize=True)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(values.mean()), float(low), float(high))
