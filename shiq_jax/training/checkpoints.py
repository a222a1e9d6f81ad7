"""Asynchronous Orbax checkpoints of a `State`, restored into any sharding."""

from __future__ import annotations

import contextlib
import io
import logging
import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from shiq_jax.errors import UserError
from shiq_jax.sharding import hosts
from shiq_jax.training.state import Params, State, partition

# Suffixes of incomplete checkpoint directories: one that is being deleted, and one that orbax is writing.
_REMOVED, _WRITTEN = ".removed", ".orbax-checkpoint-tmp"

# Two parts, so that a policy can be read without the optimizer state.
_PARTS = {"policy": ("trainable",), "memory": ("targets", "opt_state", "step")}


class Checkpoints:
    """The checkpoints of one run in one directory, numbered by update step.

    `State.frozen` is not saved; a restored state takes it from the template state.

    Args:
        directory: created if missing.
        keep: number of latest checkpoints to keep.
        best: name of a metric; the checkpoint with its largest value is kept as well.
        read_only: change nothing in the directory, for readers of a run that may be active.
    """

    def __init__(self, directory: Path, *, keep: int = 2, best: str | None = None, read_only: bool = False):
        # Orbax logs every file that it touches, which would hide the run's own messages.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)
        from orbax.checkpoint import v1 as ocp

        self.directory, self.keep, self.best, self.read_only = Path(directory), keep, best, read_only
        if not read_only:
            _prepare(self.directory)
        self._ocp = ocp
        self._saving = None
        self._checkpointer = ocp.training.Checkpointer(
            self.directory.absolute(),
            # The default policy silently drops a save that is requested while another is in progress.
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            # Orbax deletes files under the final name, so a crash could leave a partial checkpoint; see `_delete`.
            preservation_policy=ocp.training.preservation_policies.PreserveAll(),
        )

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint; None if the directory has no checkpoint."""
        self.wait()
        newest = self._checkpointer.latest
        return None if newest is None else newest.step

    def save(self, state: State, metadata: Mapping[str, Any], metrics: Mapping[str, float] | None = None) -> None:
        """Save `state` under its step: copy the arrays now, write the files in the background.

        An existing checkpoint of this step is kept, because it holds the same state. It is replaced only if it has no
        metrics and `metrics` is not empty.

        Args:
            state: the state.
            metadata: JSON values that `restore` returns, for example to identify the run and its data.
            metrics: values from which the best checkpoint is selected.
        """
        step = int(state.step)
        self.wait()
        if step in self._metrics_by_step():
            if self.metrics(step) is not None or not metrics:
                return
            self._remove([step])
        # Orbax rejects numpy floats only when it commits the step, long after this call.
        metrics = {name: float(value) for name, value in (metrics or {}).items()} or None
        self._saving = self._checkpointer.save_checkpointables_async(
            step, {part: _flatten(state, part) for part in _PARTS}, metrics=metrics, custom_metadata=dict(metadata)
        )
        if self._saving is None:
            raise RuntimeError(f"orbax did not start saving step {step} in {self.directory}")

    def restore(self, template: State, step: int | None = None) -> tuple[State, dict]:
        """The state of a step (default: the latest) in the shardings of `template`, and its metadata.

        Raises:
            UserError: the checkpoint does not exist, or its names, shapes or dtypes differ from the template's.
        """
        step = self._resolve_step(step)
        parts = {part: self._load(step, part, template) for part in _PARTS}
        fields = {name: value for part in parts.values() for name, value in part.items()}
        return template._replace(**fields), self.metadata(step)

    def restore_params(self, params: Params, step: int | None = None) -> Params:
        """`params` with the trained leaves of a step (default: the latest); the optimizer state is not read.

        Leaves that the checkpoint does not have are returned unchanged.

        Raises:
            UserError: see `restore`.
        """
        step = self._resolve_step(step)
        with self._reading(step):
            names = set(self._checkpointer.checkpointables_metadata(step).metadata["policy"])
        trainable, frozen = partition(params, lambda path: ".".join(("trainable", *path)) in names)
        state = State(trainable, frozen, {}, (), jnp.int32(0))
        return state._replace(**self._load(step, "policy", state)).params()

    def metadata(self, step: int) -> dict:
        """The JSON values saved with a step."""
        return dict(self._checkpointer.checkpointables_metadata(step).custom_metadata or {})

    def metrics(self, step: int) -> dict | None:
        """The metrics saved with a step; None if it has none."""
        return self._metrics_by_step()[step] or None

    def wait(self) -> None:
        """Wait until every save is complete on disk, then delete the checkpoints that need not be kept."""
        if self._saving is not None:
            saving, self._saving = self._saving, None
            # Without this call the save's thread and event loop are never closed.
            saving.result()
        self._checkpointer.wait()
        if not self.read_only:
            self._prune()

    def close(self) -> None:
        """Wait for saves in progress, then close the checkpointer."""
        try:
            self.wait()
        finally:
            self._checkpointer.close()

    def _metrics_by_step(self) -> dict[int, dict | None]:
        return {checkpoint.step: checkpoint.metrics for checkpoint in self._checkpointer.checkpoints}

    def _prune(self) -> None:
        """Delete all checkpoints except the latest ones and the best one."""
        metrics_by_step = self._metrics_by_step()
        keep = set(sorted(metrics_by_step)[-self.keep :])
        if self.best is not None:
            ranked = [(metrics[self.best], step) for step, metrics in metrics_by_step.items() if metrics]
            keep |= {step for _, step in sorted(ranked)[-1:]}
        self._remove(metrics_by_step.keys() - keep)

    def _remove(self, steps: Collection[int]) -> None:
        if not steps:
            return
        try:
            for step in steps:
                _delete(self.directory / str(step))
        finally:
            self._checkpointer.reload()

    def _resolve_step(self, step: int | None) -> int:
        step = self.latest() if step is None else step
        if step not in {checkpoint.step for checkpoint in self._checkpointer.checkpoints}:
            raise UserError(f"{self.directory} holds no complete checkpoint{'' if step is None else f' {step}'}")
        return step

    def _load(self, step: int, part: str, template: State) -> dict:
        fields = {name: getattr(template, name) for name in _PARTS[part]}
        expected = {name: _abstract(leaf) for name, leaf in _flatten(template, part).items()}
        with self._reading(step):
            self._check_leaves(step, part, expected)
            loaded = self._checkpointer.load_checkpointables(step, {part: expected})[part]
        return jax.tree.unflatten(jax.tree.structure(fields), [loaded[name] for name in expected])

    @contextlib.contextmanager
    def _reading(self, step: int) -> Iterator[None]:
        """Report errors inside the block as a damaged checkpoint."""
        discarded = io.StringIO()
        try:
            # When one read fails, every concurrent read prints a traceback.
            with contextlib.redirect_stderr(discarded):
                yield
        except (UserError, jax.errors.JaxRuntimeError):
            raise
        except Exception as error:
            raise UserError(
                f"checkpoint {step} in {self.directory} is damaged or incomplete ({type(error).__name__}): restore it, "
                "or remove its directory to resume from an earlier one"
            ) from error

    def _check_leaves(self, step: int, part: str, expected: Mapping[str, jax.ShapeDtypeStruct]) -> None:
        """Raise UserError if names, shapes or dtypes differ; Orbax's own errors name internals of the restore."""
        saved = self._checkpointer.checkpointables_metadata(step).metadata[part]
        mismatch = f"checkpoint {step} in {self.directory} belongs to another configuration"
        for name in sorted(set(saved) ^ set(expected)):
            raise UserError(f"{mismatch}: it has {'no' if name in expected else 'a'} {name}")
        for name, leaf in expected.items():
            shape, dtype = tuple(saved[name].shape), str(saved[name].dtype)
            if (shape, dtype) != (tuple(leaf.shape), str(leaf.dtype)):
                raise UserError(f"{mismatch}: {name} is {dtype}{list(shape)}, expected {leaf.dtype}{list(leaf.shape)}")


@hosts.on_writer
def _prepare(directory: Path) -> None:
    """Create the directory, or remove incomplete checkpoints that a killed process left in it."""
    directory.mkdir(parents=True, exist_ok=True)
    for suffix in (_REMOVED, _WRITTEN):
        for incomplete in directory.glob(f"*{suffix}*"):
            shutil.rmtree(incomplete)


@hosts.on_writer
def _delete(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint.rename(checkpoint.with_name(checkpoint.name + _REMOVED)))


def _flatten(state: State, part: str) -> dict[str, Any]:
    """Flat dict path -> leaf; it hides empty subtrees and optimizer tuples, which formats store differently."""
    leaves, _ = jax.tree_util.tree_flatten_with_path({name: getattr(state, name) for name in _PARTS[part]})
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _abstract(leaf) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
