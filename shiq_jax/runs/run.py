"""What all stages of a run share, made once from its options."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from shiq_jax.data.chat import encode_prompt, load_tokenizer, stop_tokens
from shiq_jax.errors import UserError
from shiq_jax.models import DecoderConfig, ModelWithHeads, fingerprint, load_hf, locate
from shiq_jax.rollout import rewards
from shiq_jax.runs.metrics import MetricsLog
from shiq_jax.runs.options import Job
from shiq_jax.runs.run_directory import RunDirectory
from shiq_jax.runs.sources import Task, prepare
from shiq_jax.runs.trackers import trackers
from shiq_jax.training.placement import mesh_from_flag


class RngStream(enum.IntEnum):
    """Uses of random numbers in a run; each has its own key."""

    SAMPLING = 0
    EVALUATION = 1
    HEADS = 4
    ADAPTERS = 5
    CURVATURE = 6


@dataclasses.dataclass(frozen=True)
class Run:
    """What all stages of a run share; `settings` are its options as checkpoints and trackers show them."""

    job: Job
    directory: RunDirectory
    settings: Mapping[str, Any]
    task: Task
    mesh: jax.sharding.Mesh | None
    tokenizer: Any
    stops: tuple[int, ...]
    log: MetricsLog

    def key(self, use: RngStream, round: int = 0) -> jax.Array:
        """The random key of a use in a round."""
        key = jax.random.fold_in(jax.random.key(self.job.seed), int(use))
        return jax.random.fold_in(key, round) if round else key

    def seed(self, round: int = 0) -> int:
        """The seed of the data order in a round."""
        # Rounds must not share orders with runs of neighbouring seeds.
        return (self.job.seed + round * 0x9E3779B97F4A7C15) % 2**64

    def load(self, source: str | Path):
        """Model and parameters of a directory or hub id, on this run's mesh and in its precision.

        A policy that the run itself exported comes with its heads.

        Raises:
            UserError: they cannot be loaded, or differ from those that the run has used before.
        """
        options = self.job.precision
        model, params = load_hf(
            source, mesh=self.mesh, compute_dtype=jnp.dtype(options.compute), remat=options.remat,
            engine=options.attention,
        )  # fmt: skip
        if Path(source).is_relative_to(self.directory.rounds):
            model, params = ModelWithHeads.load(model, params, Path(source))
        roles = {str(self.task.model): "model", str(self.directory.reference): "reference"}
        role = roles.get(str(source)) or str(Path(source).relative_to(self.directory.path))
        self.directory.keep_weights(role, fingerprint(params), source)
        return model, params


def set_up(job: Job, directory: RunDirectory, settings: Mapping[str, Any]) -> Run:
    """Prepare what all stages share; input that can be checked before any computation is checked here."""
    task, mesh = prepare(job, directory), mesh_from_flag(job.mesh)
    source = locate(task.model)
    # Read first: transformers would blame the tokenizer for an error in config.json.
    config = DecoderConfig.read(source)
    tokenizer, context = load_tokenizer(source, config.vocab_size), config.max_positions
    rows = [(row, job.collection.sampling.max_tokens) for row in task.train]
    rows += [(row, job.evaluation.max_tokens) for row in task.held_out or ()]
    for row, new in rows:
        length = len(encode_prompt(tokenizer, row["prompt"], row.get("tools")))
        if length + new > context:
            raise UserError(
                f"{rewards.describe(row)} has {length} tokens, and with {new} new ones exceeds the model's "
                f"context of {context}: leave it out or lower max_tokens"
            )
    log = MetricsLog(directory.metrics, trackers(job.track, directory, settings))
    return Run(job, directory, settings, task, mesh, tokenizer, stop_tokens(tokenizer, source), log)
