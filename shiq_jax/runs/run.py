"""State shared by all stages of a run, and its setup from the options."""

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
from shiq_jax.runs.sources import Task, prepare_task
from shiq_jax.runs.trackers import create_trackers
from shiq_jax.training.placement import mesh_from_flag


class RngStream(enum.IntEnum):
    """Independent streams of random numbers in a run; each has its own key."""

    SAMPLING = 0
    EVALUATION = 1
    HEADS = 4
    ADAPTERS = 5
    CURVATURE = 6


@dataclasses.dataclass(frozen=True)
class Run:
    """State shared by all stages of a run.

    Attributes:
        job: the options.
        directory: paths of the run.
        settings: options as stored in checkpoints and shown by trackers.
        task: model, prompts, demonstrations and reward.
        mesh: device mesh; None for a single device.
        tokenizer: tokenizer of the model.
        stop_tokens: tokens that end a completion.
        log: metrics log.
    """

    job: Job
    directory: RunDirectory
    settings: Mapping[str, Any]
    task: Task
    mesh: jax.sharding.Mesh | None
    tokenizer: Any
    stop_tokens: tuple[int, ...]
    log: MetricsLog

    def key(self, stream: RngStream, round: int = 0) -> jax.Array:
        """The random key of a stream in a round."""
        key = jax.random.fold_in(jax.random.key(self.job.seed), int(stream))
        return jax.random.fold_in(key, round) if round else key

    def seed(self, round: int = 0) -> int:
        """The seed of the data order in a round."""
        # seed + round would repeat the order of round 0 of the next seed.
        return (self.job.seed + round * 0x9E3779B97F4A7C15) % 2**64

    def load(self, source: str | Path):
        """Load model and parameters of a directory or hub id onto this run's mesh, in its precision.

        A policy exported by an earlier round is loaded with its heads.

        Raises:
            UserError: the weights cannot be loaded, or differ from those that the run used before.
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
        self.directory.record_weights(role, fingerprint(params), source)
        return model, params


def set_up(job: Job, directory: RunDirectory, settings: Mapping[str, Any]) -> Run:
    """Load task, mesh and tokenizer, and check that all prompts fit into the model's context."""
    task, mesh = prepare_task(job, directory), mesh_from_flag(job.mesh)
    source = locate(task.model)
    # Read before the tokenizer: transformers attributes errors in config.json to the tokenizer.
    config = DecoderConfig.read(source)
    tokenizer, context = load_tokenizer(source, config.vocab_size), config.max_positions
    rows = [(row, job.collection.sampling.max_tokens) for row in task.train]
    rows += [(row, job.evaluation.max_tokens) for row in task.held_out or ()]
    for row, max_tokens in rows:
        length = len(encode_prompt(tokenizer, row["prompt"], row.get("tools")))
        if length + max_tokens > context:
            raise UserError(
                f"{rewards.describe(row)} has {length} tokens, which with max_tokens {max_tokens} exceeds the model's "
                f"context of {context}: remove the prompt or lower max_tokens"
            )
    log = MetricsLog(directory.metrics, create_trackers(job.track, directory, settings))
    return Run(job, directory, settings, task, mesh, tokenizer, stop_tokens(tokenizer, source), log)
