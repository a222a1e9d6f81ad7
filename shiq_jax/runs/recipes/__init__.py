"""Outer-loop algorithms: each recipe says what a round samples, scores, annotates and learns."""

from shiq_jax.runs.options import Job
from shiq_jax.runs.recipes.iterative import Iterative
from shiq_jax.runs.recipes.offline import Offline
from shiq_jax.runs.rounds import Recipe


def recipe_of(job: Job) -> Recipe:
    """The recipe that a job's options ask for."""
    return Iterative(job) if job.rounds > 1 else Offline(job)
