"""The directories of a run and of its rounds: one place that knows the name of every file in them."""

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
        path: of the round; the run's own where a run has one round.
        policy: where the policy that the round made is exported.
    """

    def __init__(self, path: Path, policy: Path):
        self.path, self.policy = Path(path), Path(policy)
        self.buffer = self.path / "buffer"
        self.labelled = self.path / "labelled"
        self.checkpoints = self.path / "checkpoints"
        self.done = self.path / "round.json"


class RunDirectory(RoundDirectory):
    """Paths of a run, and of its round if it has only one; creates, locks and discards the run."""

    # Directories that were created for the run, the innermost first.
    _made: tuple[Path, ...] = ()

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

    def begun_rounds(self) -> list[RoundDirectory]:
        """The directories of the rounds that have begun, the newest last; the run's own where it has one round."""
        numbers = sorted(int(path.name) for path in self.rounds.glob("[0-9]*")) if self.rounds.is_dir() else []
        count = read_json(self.config)["rounds"] if numbers else 1
        return [self.round(number, count) for number in numbers] or [self]

    def latest_round(self) -> RoundDirectory:
        """The directory of the newest round that has begun."""
        return self.begun_rounds()[-1]

    def start_of(self, round: RoundDirectory) -> Path | str:
        """Path or hub id that a round starts from: the policy of the round before, the reference, or the model."""
        if round.path.parent == self.rounds and int(round.path.name) > 0:
            return self.rounds / f"{int(round.path.name) - 1:03d}" / "policy"
        return self.reference if self.reference.exists() else read_json(self.task)["model"]

    def generations(self, step: int) -> Path:
        """The file of the generations after `step` updates."""
        return self.samples / f"{step:06d}.jsonl"

    @classmethod
    def begin(cls, path: Path, settings: dict[str, Any], *, resume: bool) -> RunDirectory:
        """A new run in an empty or missing directory, or the one that is there, of the same settings, with `resume`.

        Raises:
            UserError: the directory holds a run and `resume` is not asked for, holds none and it is, holds other files,
                or holds a run of other settings.
        """
        run = cls(path)
        if not resume:
            if run.config.exists():
                raise run._taken()
            if run.path.exists() and (not run.path.is_dir() or set(run.path.iterdir()) - set(run._unborn())):
                raise UserError(f"{path} is not empty and holds no run: name another --output-dir")
            run._made = tuple(place for place in (run.path, *run.path.parents) if not place.exists())
            run._make(_plain(settings))
            return run
        if not run.config.exists():
            raise UserError(f"{path} holds no run to resume (it has no config.json): leave --resume out to begin one")
        known = read_json(run.config)
        if known.get("format") != settings.get("format"):
            raise UserError(
                f"{path} was begun by another version of shiq_jax, whose runs this one cannot resume: finish it with "
                "that version, or begin another run"
            )
        refuse_differences(path, known, settings)
        return run

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the run for this process; the kernel releases the lock however the process ends.

        Raises:
            UserError: another process is at work in the directory.
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
                f"another process is at work in {self.path}: wait until it has ended, or name another --output-dir"
            ) from None
        for left in self._unborn():
            left.unlink(missing_ok=True)

    @hosts.on_writer
    def _make(self, settings: dict[str, Any]) -> None:
        """Make the directory and its config.json, or leave nothing."""
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            self._claim(settings)
        except BaseException:
            self._unmake()
            raise

    @hosts.on_writer
    def _claim(self, settings: dict[str, Any]) -> None:
        """Create config.json atomically and by one process only; a rename could replace that of a run just begun."""
        own = self.config.with_name(f"{self.config.name}.{secrets.token_hex(4)}{TEMPORARY}")
        write_json(own, settings)
        try:
            os.link(own, self.config)
        except (FileExistsError, FileNotFoundError):
            # Another process has created it, and may already have removed the leftovers of others.
            raise self._taken() from None
        except OSError:
            # A file system without hard links.
            own.replace(self.config)
        finally:
            own.unlink(missing_ok=True)
        sync_directory(self.path)

    def _unborn(self) -> list[Path]:
        """Temporary files of processes that were killed before their run had a config.json."""
        return list(self.path.glob(f"{self.config.name}.*{TEMPORARY}"))

    def _taken(self) -> UserError:
        return UserError(
            f"{self.path} holds a run already: add --resume to go on with it, or name another --output-dir"
        )

    @hosts.on_writer(wait=False)
    def discard(self, *, samples: bool) -> None:
        """Delete a run that was refused before it learned anything, so that the command can be corrected and repeated.

        Args:
            samples: whether the buffer's records were sampled; a run that has such records is kept.
        """
        if self.metrics.exists() or (samples and any(self.latest_round().buffer.glob("records-*.arrow"))):
            return
        for entry in self.path.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                entry.unlink(missing_ok=True)
        self._unmake()

    def keep_weights(self, role: str, digest: str, source: str | Path) -> None:
        """Record the fingerprint of the weights in a role such as "model", or compare it with the recorded one.

        Raises:
            UserError: the weights in `source` differ from those that the run has used before.
        """
        known = read_json(self.weights) if self.weights.exists() else {}
        if known.setdefault(role, digest) != digest:
            raise UserError(
                f"{source} holds other weights than those that {self.path} was begun with: restore them, or begin "
                "another run"
            )
        if not self.weights.exists() or read_json(self.weights) != known:
            write_json(self.weights, known)

    @hosts.on_writer
    def _unmake(self) -> None:
        """Remove the directories that were created for this run, if they are empty."""
        with contextlib.suppress(OSError):
            for place in self._made:
                place.rmdir()


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a run; UserError when it is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not readable as JSON: restore it, or begin another run") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object: restore it, or begin another run")
    return content


def write_json(path: Path, value: Any) -> None:
    """Replace a file by indented JSON, atomically."""
    text = json.dumps(value, indent=2) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def write_jsonl(path: Path, rows: list[dict]) -> None:
    """Replace a file by one JSON object per line, atomically."""
    text = "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
    write_atomically(path, lambda file: file.write(text.encode()))


def refuse_differences(path: Path, known: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raises UserError naming the first wanted setting that differs from those that `path` was begun with."""
    for name, there, here in _differences(known, _plain(wanted)):
        if name.endswith("_digest"):
            option = name.removesuffix("_digest").replace("_", ".")
            raise UserError(
                f"the files of --{option} are not those that {path} was begun with: restore them, or begin another run"
            )
        raise UserError(
            f"{path} was begun with {name}={there!r}, not {here!r}: resume it with its own options and data"
        )


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings as JSON stores them: paths as text, tuples as lists."""
    return json.loads(json.dumps(settings, default=str))


def _differences(known: dict, wanted: dict, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    for name in sorted(set(known) | set(wanted)):
        there, here = known.get(name), wanted.get(name)
        if isinstance(there, dict) and isinstance(here, dict):
            yield from _differences(there, here, f"{prefix}{name}.")
        elif there != here:
            yield prefix + name, there, here
