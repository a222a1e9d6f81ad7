"""Outer-loop algorithms: a recipe defines how each round collects data and which plan it trains with."""

from shiq_jax.runs.options import Job
from shiq_jax.runs.recipes.iterative import Iterative
from shiq_jax.runs.recipes.offline import Offline
from shiq_jax.runs.rounds import Recipe


def select_recipe(job: Job) -> Recipe:
    """The recipe for the options of a job."""
    return Iterative(job) if job.rounds > 1 else Offline(job)
