"""Paired bootstrap intervals over questions and seeds."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float


class Interval(NamedTuple):
    """A mean and its bootstrap confidence interval."""

    mean: float
    low: float
    high: float


def interval(
    values: Float[np.ndarray, "seeds questions"], *, resamples: int = 10_000, level: float = 0.95, seed: int = 0
) -> Interval:
    """Percentile interval of the mean from resampling seeds and questions independently.

    For a paired comparison, `values` are the differences between two policies on the same question and seed. Resampling
    both factors (the pigeonhole bootstrap; Owen, 2007) is conservative: it does not underestimate the variance.

    Args:
        values: one number per seed and question.
        resamples: number of bootstrap samples.
        level: coverage of the interval.
        seed: random seed.
    """
    seeds, questions = values.shape
    rng = np.random.default_rng(seed)
    seed_weights = rng.multinomial(seeds, np.full(seeds, 1 / seeds), resamples) / seeds
    question_weights = rng.multinomial(questions, np.full(questions, 1 / questions), resamples) / questions
    means = np.einsum("bs,sq,bq->b", seed_weights, values, question_weights, optimize=True)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(values.mean()), float(low), float(high))
