"""Orbax checkpoints of a `State`: asynchronous, the last few and the best kept, restored into any sharding."""

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

# What a checkpoint is called while its files are deleted, so that none is ever seen with a part of them, and what orbax
# calls one whose files are being written.
_REMOVED, _WRITTEN = ".removed", ".orbax-checkpoint-tmp"

# Two parts, so that a policy can be read without the optimiser's memory.
_PARTS = {"policy": ("trainable",), "memory": ("targets", "opt_state", "step")}


class Checkpoints:
    """The checkpoints of one run in one directory, numbered by update step.

    What learns is saved: `State.frozen` comes from the model's own files and is taken from the state that is restored
    into.

    Args:
        directory: made if missing.
        keep: how many of the latest to keep.
        best: name of a metric; the checkpoint where it is largest is kept besides.
        read_only: leave alone what another process may be writing.
    """

    def __init__(self, directory: Path, *, keep: int = 2, best: str | None = None, read_only: bool = False):
        # Orbax logs every file that it touches, which would bury what a run has to say.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)
        from orbax.checkpoint import v1 as ocp

        self.directory, self.keep, self.best, self.read_only = Path(directory), keep, best, read_only
        if not read_only:
            _tidy(self.directory)
        self._ocp = ocp
        self._saving = None
        self._checkpointer = ocp.training.Checkpointer(
            self.directory.absolute(),
            # The default policy drops a save without a word while another is under way.
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            # Orbax would delete a checkpoint file by file under its own name; see `_prune`.
            preservation_policy=ocp.training.preservation_policies.PreserveAll(),
        )

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint, None if there is none."""
        self.wait()
        newest = self._checkpointer.latest
        return None if newest is None else newest.step

    def save(self, state: State, metadata: Mapping[str, Any], metrics: Mapping[str, float] | None = None) -> None:
        """Start writing `state` under its step; returns once the arrays are copied, the files follow in the background.

        A step that is already there is left as it is, for it holds the same state, unless it lacks metrics that are
        given now.

        Args:
            state: what to save.
            metadata: JSON values that `restore` gives back; they say which run and data the state belongs to.
            metrics: numbers that choose the best checkpoint.
        """
        step = int(state.step)
        self.wait()
        if step in self._known():
            if self.metrics(step) is not None or not metrics:
                return
            self._remove([step])
        # A numpy float among the metrics would fail when the step is committed, long after this call.
        metrics = {name: float(value) for name, value in (metrics or {}).items()} or None
        self._saving = self._checkpointer.save_checkpointables_async(
            step, {part: _flatten(state, part) for part in _PARTS}, metrics=metrics, custom_metadata=dict(metadata)
        )
        if self._saving is None:
            raise RuntimeError(f"orbax did not start saving step {step} in {self.directory}")

    def restore(self, into: State, step: int | None = None) -> tuple[State, dict]:
        """The state of a step (default: the latest) in the shardings of `into`, and its metadata.

        Raises:
            UserError: there is no checkpoint, or its arrays are not those of `into`.
        """
        step = self._existing(step)
        parts = {part: self._load(step, part, into) for part in _PARTS}
        fields = {name: value for part in parts.values() for name, value in part.items()}
        return into._replace(**fields), self.metadata(step)

    def restore_params(self, params: Params, step: int | None = None) -> Params:
        """`params` with what has learned taken from a step (default: the latest); the optimiser's memory is not read.

        Raises:
            UserError: as `restore`; leaves that the checkpoint does not have are left as they are.
        """
        step = self._existing(step)
        with self._whole(step):
            names = set(self._checkpointer.checkpointables_metadata(step).metadata["policy"])
        learned, rest = partition(params, lambda path: ".".join(("trainable", *path)) in names)
        state = State(learned, rest, {}, (), jnp.int32(0))
        return state._replace(**self._load(step, "policy", state)).params()

    def metadata(self, step: int) -> dict:
        """The JSON values that were saved with a step."""
        return dict(self._checkpointer.checkpointables_metadata(step).custom_metadata or {})

    def metrics(self, step: int) -> dict | None:
        """The numbers that were saved with a step, None if there were none."""
        return self._known()[step] or None

    def wait(self) -> None:
        """Return when every started save is complete on disk, and what is not to be kept is gone."""
        if self._saving is not None:
            saving, self._saving = self._saving, None
            # Without this call the thread and the event loop of the save outlive it.
            saving.result()
        self._checkpointer.wait()
        if not self.read_only:
            self._prune()

    def close(self) -> None:
        """Finish what is under way and let go of the directory."""
        try:
            self.wait()
        finally:
            self._checkpointer.close()

    def _known(self) -> dict[int, dict | None]:
        return {known.step: known.metrics for known in self._checkpointer.checkpoints}

    def _prune(self) -> None:
        """Remove what is neither among the latest nor the best."""
        known = self._known()
        keep = set(sorted(known)[-self.keep :])
        if self.best is not None:
            ranked = [(metrics[self.best], step) for step, metrics in known.items() if metrics]
            keep |= {step for _, step in sorted(ranked)[-1:]}
        self._remove(known.keys() - keep)

    def _remove(self, steps: Collection[int]) -> None:
        if not steps:
            return
        try:
            for step in steps:
                _delete(self.directory / str(step))
        finally:
            self._checkpointer.reload()

    def _existing(self, step: int | None) -> int:
        step = self.latest() if step is None else step
        if step not in {known.step for known in self._checkpointer.checkpoints}:
            raise UserError(f"{self.directory} holds no complete checkpoint{'' if step is None else f' {step}'}")
        return step

    def _load(self, step: int, part: str, into: State) -> dict:
        like = {name: getattr(into, name) for name in _PARTS[part]}
        wanted = {name: _abstract(leaf) for name, leaf in _flatten(into, part).items()}
        with self._whole(step):
            self._compare(step, part, wanted)
            loaded = self._checkpointer.load_checkpointables(step, {part: wanted})[part]
        return jax.tree.unflatten(jax.tree.structure(like), [loaded[name] for name in wanted])

    @contextlib.contextmanager
    def _whole(self, step: int) -> Iterator[None]:
        """Inside, whatever reading a checkpoint raises means that its files are damaged."""
        noise = io.StringIO()
        try:
            # Reads that are under way when one fails complain one by one, long tracebacks and all.
            with contextlib.redirect_stderr(noise):
                yield
        except (UserError, jax.errors.JaxRuntimeError):
            raise
        except Exception as error:
            raise UserError(
                f"checkpoint {step} in {self.directory} is damaged or incomplete ({type(error).__name__}): restore it, "
                "or remove its directory to go on from an earlier one"
            ) from error

    def _compare(self, step: int, part: str, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> None:
        """Orbax reports a mismatch from deep inside a restore; the names and shapes can be compared first."""
        there = self._checkpointer.checkpointables_metadata(step).metadata[part]
        where = f"checkpoint {step} in {self.directory} belongs to another configuration"
        for name in sorted(set(there) ^ set(wanted)):
            raise UserError(f"{where}: it has {'no' if name in wanted else 'a'} {name}")
        for name, leaf in wanted.items():
            found = (tuple(there[name].shape), str(there[name].dtype))
            if found != (tuple(leaf.shape), str(leaf.dtype)):
                raise UserError(
                    f"{where}: {name} is {found[1]}{list(found[0])}, expected is {leaf.dtype}{list(leaf.shape)}"
                )


@hosts.on_writer
def _tidy(directory: Path) -> None:
    """Make the directory, or remove what a process that was killed has left in it."""
    directory.mkdir(parents=True, exist_ok=True)
    for state in (_REMOVED, _WRITTEN):
        for left in directory.glob(f"*{state}*"):
            shutil.rmtree(left)


@hosts.on_writer
def _delete(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint.rename(checkpoint.with_name(checkpoint.name + _REMOVED)))


def _flatten(state: State, part: str) -> dict[str, Any]:
    """A flat dict by path: empty subtrees and optimiser tuples, which formats treat differently, leave no trace."""
    leaves, _ = jax.tree_util.tree_flatten_with_path({name: getattr(state, name) for name in _PARTS[part]})
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _abstract(leaf) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
