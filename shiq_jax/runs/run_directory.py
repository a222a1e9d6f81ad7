"""Paths of all files of a run and of its rounds, and the creation, locking and deletion of a run's directory."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shiq_jax.errors import UserError
from shiq_jax.replay.locks import exclusive_lock
from shiq_jax.replay.storage import TEMPORARY, sync_directory, write_atomically
from shiq_jax.sharding import hosts


class RoundDirectory:
    """Paths of one round.

    Args:
        path: directory of the round; the run's directory if the run has one round.
        policy: directory of the round's exported policy.
    """

    def __init__(self, path: Path, policy: Path):
        self.path, self.policy = Path(path), Path(policy)
        self.buffer = self.path / "buffer"
        self.labeled = self.path / "labelled"
        self.checkpoints = self.path / "checkpoints"
        self.round_summary = self.path / "round.json"


class RunDirectory(RoundDirectory):
    """Paths of a run, and of its round if it has only one; creates, locks and discards the run."""

    # Directories created for the run, innermost first.
    _created: tuple[Path, ...] = ()

    def __init__(self, path: Path):
        self.export = Path(path) / "export"
        super().__init__(path, self.export)
        self.rounds = self.path / "rounds"
        self.config = self.path / "config.json"
        self.task = self.path / "task.json"
        self.weights = self.path / "weights.json"
        self.model = self.path / "model"
        self.data = self.path / "data"
        self.warm_start = self.path / "warm_start"
        self.reference = self.path / "reference"
        self.privacy = self.path / "privacy.json"
        self.public = self.path / "public"
        self.secret = self.path / "secret.key"
        self.metrics = self.path / "metrics.jsonl"
        self.samples = self.path / "samples"
        self.curve = self.path / "learning_curve.png"
        self.improvement = self.path / "improvement.png"
        self.summary = self.path / "summary.json"
        self.tensorboard = self.path / "tensorboard"
        self.wandb = self.path / "wandb"
        self.wandb_id = self.path / "wandb.json"

    def round(self, number: int, count: int) -> RoundDirectory:
        """The directory of round `number` of `count`; the last one's policy is the run's export."""
        if count == 1:
            return self
        path = self.rounds / f"{number:03d}"
        return RoundDirectory(path, self.export if number == count - 1 else path / "policy")

    def started_rounds(self) -> list[RoundDirectory]:
        """The directories of all started rounds, oldest first; the run's own directory if it has one round."""
        numbers = sorted(int(path.name) for path in self.rounds.glob("[0-9]*")) if self.rounds.is_dir() else []
        count = read_json(self.config)["rounds"] if numbers else 1
        return [self.round(number, count) for number in numbers] or [self]

    def latest_round(self) -> RoundDirectory:
        """The directory of the newest started round."""
        return self.started_rounds()[-1]

    def initial_policy(self, round: RoundDirectory) -> Path | str:
        """Path or hub id of a round's initial policy: the previous round's policy, the reference, or the model."""
        if round.path.parent == self.rounds and int(round.path.name) > 0:
            return self.rounds / f"{int(round.path.name) - 1:03d}" / "policy"
        return self.reference if self.reference.exists() else read_json(self.task)["model"]

    def generations(self, step: int) -> Path:
        """The file with the generations after `step` updates."""
        return self.samples / f"{step:06d}.jsonl"

    @classmethod
    def begin(cls, path: Path, settings: dict[str, Any], *, resume: bool) -> RunDirectory:
        """Create a run in an empty or missing directory, or open an existing run with the same settings to resume it.

        Raises:
            UserError: without `resume`, the directory holds a run or other files; with `resume`, it holds no run, or a
                run with other settings.
        """
        run = cls(path)
        if not resume:
            if run.config.exists():
                raise run._already_exists_error()
            if run.path.exists() and (
                not run.path.is_dir() or set(run.path.iterdir()) - set(run._stale_config_files())
            ):
                raise UserError(f"{path} is not empty and holds no run: choose another --output-dir")
            run._created = tuple(path for path in (run.path, *run.path.parents) if not path.exists())
            run._create(_to_json_types(settings))
            return run
        if not run.config.exists():
            raise UserError(f"{path} holds no run to resume (it has no config.json): omit --resume to start a run")
        recorded = read_json(run.config)
        if recorded.get("format") != settings.get("format"):
            raise UserError(
                f"{path} was started by an incompatible version of shiq_jax: finish it with that version, or start "
                "another run"
            )
        check_same_settings(path, recorded, settings)
        return run

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the run for this process; the kernel releases the lock when the process ends, even if it is killed.

        Raises:
            UserError: another process holds the lock.
        """
        with contextlib.ExitStack() as stack:
            self._lock(stack)
            yield

    @hosts.on_writer
    def _lock(self, stack: contextlib.ExitStack) -> None:
        try:
            stack.enter_context(exclusive_lock(self.config))
        except (BlockingIOError, FileNotFoundError):
            raise UserError(
                f"another process is using {self.path}: wait until it has ended, or choose another --output-dir"
            ) from None
        for file in self._stale_config_files():
            file.unlink(missing_ok=True)

    @hosts.on_writer
    def _create(self, settings: dict[str, Any]) -> None:
        """Create the directory and its config.json, or nothing."""
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            self._create_config(settings)
        except BaseException:
            self._remove_created()
            raise

    @hosts.on_writer
    def _create_config(self, settings: dict[str, Any]) -> None:
        """Create config.json atomically; a hard link, unlike a rename, fails if another process has just created it."""
        temporary = self.config.with_name(f"{self.config.name}.{secrets.token_hex(4)}{TEMPORARY}")
        write_json(temporary, settings)
        try:
            os.link(temporary, self.config)
        except (FileExistsError, FileNotFoundError):
            # Another process created config.json, and may have deleted our temporary file as stale.
            raise self._already_exists_error() from None
        except OSError:
            # The file system has no hard links.
            temporary.replace(self.config)
        finally:
            temporary.unlink(missing_ok=True)
        sync_directory(self.path)

    def _stale_config_files(self) -> list[Path]:
        """Temporary files of processes that were killed before they created config.json."""
        return list(self.path.glob(f"{self.config.name}.*{TEMPORARY}"))

    def _already_exists_error(self) -> UserError:
        return UserError(
            f"{self.path} already holds a run: add --resume to continue it, or choose another --output-dir"
        )

    @hosts.on_writer(wait=False)
    def discard(self, *, samples: bool) -> None:
        """Delete a run that failed before its first update, so that the corrected command can be repeated.

        Args:
            samples: whether the records of the buffer were sampled; a run with sampled records is kept.
        """
        if self.metrics.exists() or (samples and any(self.latest_round().buffer.glob("records-*.arrow"))):
            return
        for entry in self.path.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                entry.unlink(missing_ok=True)
        self._remove_created()

    def record_weights(self, role: str, digest: str, source: str | Path) -> None:
        """Record the fingerprint of the weights in a role such as "model", or compare it with the recorded one.

        Raises:
            UserError: the weights in `source` differ from those that the run used before.
        """
        fingerprints = read_json(self.weights) if self.weights.exists() else {}
        if fingerprints.setdefault(role, digest) != digest:
            raise UserError(
                f"the weights in {source} have changed since {self.path} was started: restore them, or start another "
                "run"
            )
        if not self.weights.exists() or read_json(self.weights) != fingerprints:
            write_json(self.weights, fingerprints)

    @hosts.on_writer
    def _remove_created(self) -> None:
        """Remove the directories created for this run, if they are empty."""
        with contextlib.suppress(OSError):
            for path in self._created:
                path.rmdir()


def read_json(path: Path) -> dict[str, Any]:
    """Read the JSON object in a file of a run; raises UserError if the file is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not readable as JSON: restore it, or start another run") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object: restore it, or start another run")
    return content


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON, atomically replacing the file."""
    text = json.dumps(value, indent=2) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def write_jsonl(path: Path, rows: list[dict]) -> None:
    """Write one JSON object per line, atomically replacing the file."""
    text = "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
    write_atomically(path, lambda file: file.write(text.encode()))


def check_same_settings(path: Path, recorded: dict[str, Any], current: dict[str, Any]) -> None:
    """Raise UserError for the first setting that differs from those that `path` was started with."""
    for name, old, new in _differences(recorded, _to_json_types(current)):
        if name.endswith("_digest"):
            option = name.removesuffix("_digest").replace("_", ".")
            raise UserError(
                f"the files of --{option} have changed since {path} was started: restore them, or start another run"
            )
        raise UserError(
            f"{path} was started with {name}={old!r}, not {new!r}: resume it with the same options and data"
        )


def _to_json_types(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings as JSON stores them: paths as strings, tuples as lists."""
    return json.loads(json.dumps(settings, default=str))


def _differences(old: dict, new: dict, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted name, old value, new value) of every difference between two nested dictionaries."""
    for name in sorted(set(old) | set(new)):
        old_value, new_value = old.get(name), new.get(name)
        if isinstance(old_value, dict) and isinstance(new_value, dict):
            yield from _differences(old_value, new_value, f"{prefix}{name}.")
        elif old_value != new_value:
            yield prefix + name, old_value, new_value
