"""TensorBoard and Weights & Biases trackers, which mirror the metrics log of a run."""

from __future__ import annotations

import importlib.util
import json
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from shiq_jax.errors import UserError
from shiq_jax.runs.metrics import Tracker
from shiq_jax.runs.run_directory import RunDirectory, write_json
from shiq_jax.sharding import hosts

# Tracker -> required package; the optional dependency that installs it has the name of the tracker.
PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}


def check_available(names: Sequence[str]) -> None:
    """Check that the trackers can be used, before a run writes anything.

    Raises:
        UserError: a package is not installed, or W&B has no API key.
    """
    for name in names:
        if importlib.util.find_spec(PACKAGES[name]) is None:
            raise UserError(
                f"--track {name} needs the package {PACKAGES[name]}, which is not installed: pip install "
                f"'shiq_jax[{name}]', or omit --track {name} (metrics.jsonl is always written)"
            )
    if "wandb" in names:
        _log_in()


def create_trackers(names: Sequence[str], directory: RunDirectory, settings: Mapping[str, Any]) -> list[Tracker]:
    """Create the trackers of a run; `Tracker.begin` starts them.

    Args:
        names: "tensorboard", "wandb".
        directory: run directory for their files; its `samples/` provides the generations.
        settings: options of the run.
    """
    classes = {"tensorboard": TensorBoard, "wandb": WandB}
    return [classes[name](directory, settings) for name in dict.fromkeys(names)]


class TensorBoard:
    """Event files in `tensorboard/`, rewritten from the log whenever a run starts or resumes.

    Rewriting avoids duplicate and stale points after an interruption. `purge_step` cannot remove them, because the
    steps of the warm start and of the training phases both count from 1.
    """

    def __init__(self, directory: RunDirectory, settings: Mapping[str, Any]):
        self._directory, self._settings, self._writer = directory, settings, None

    @hosts.on_writer
    def begin(self, rows: list[dict]) -> None:
        """Replace the event files with one that holds the settings and all rows."""
        from tensorboardX import SummaryWriter

        self.close()
        self._directory.tensorboard.mkdir(exist_ok=True)
        for file in self._directory.tensorboard.glob("events.out.tfevents.*"):
            file.unlink()
        # Purges the points that a running TensorBoard has already read.
        self._writer = SummaryWriter(str(self._directory.tensorboard), purge_step=0, flush_secs=10)
        self._writer.add_text("settings", _code(json.dumps(self._settings, indent=2, default=str)), 0)
        for row in rows:
            self.write(row)

    def write(self, row: dict) -> None:
        """Write one scalar `stage/name` per metric, and the row's generations as text."""
        for name, value in _metrics(row).items():
            self._writer.add_scalar(f"{_stage(row)}/{name}", value, row["step"])
        for number, text in enumerate(map(_markdown, _generations(self._directory, row))):
            self._writer.add_text(f"samples/{number:02d}", text, row["step"])

    def close(self) -> None:
        """Flush and close the file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class WandB:
    """One W&B run per run directory; `wandb.json` stores its id and the number of rows sent.

    The W&B step of a row is its line number in the log. W&B cannot delete points, so a resumed run sends only new
    lines; the lines that it rewrites are identical.
    """

    def __init__(self, directory: RunDirectory, settings: Mapping[str, Any]):
        self._directory, self._settings, self._run = directory, settings, None

    def begin(self, rows: list[dict]) -> None:
        """Open or resume the W&B run, and send the missing rows."""
        if self._run is None:
            self._open()
        self._line = 0
        for row in rows:
            self.write(row)

    def write(self, row: dict) -> None:
        """Send the row, with its generations as a table, unless it was sent before."""
        line, self._line = self._line, self._line + 1
        if line < self._sent:
            return
        values = {f"{_stage(row)}/{name}": value for name, value in _metrics(row).items()}
        if generations := list(_generations(self._directory, row)):
            import wandb

            columns = list(generations[0])
            data = [[generation[name] for name in columns] for generation in generations]
            table = wandb.Table(columns=columns, data=data)
            values[f"{_stage(row)}/generations"] = table
        self._run.log(values | {f"{_stage(row)}/step": row["step"]}, step=line, commit=True)
        self._sent = line + 1
        self._save_progress()

    def close(self) -> None:
        """Finish the W&B run."""
        if self._run is not None:
            self._run.finish()
            self._run = None

    def _open(self) -> None:
        import wandb

        file = self._directory.wandb_id
        progress = json.loads(file.read_text()) if file.exists() else {"id": secrets.token_hex(4), "rows": 0}
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "shiq_jax"),
                name=self._directory.path.name,
                id=progress["id"],
                resume="allow",
                dir=str(self._directory.path),
                config=dict(self._settings),
                settings=wandb.Settings(console="off"),
            )
        except wandb.Error as error:
            raise UserError(
                f"--track wandb: W&B failed to open a run ({error}): fix the cause, or omit --track wandb"
            ) from error
        for stage in ("warm_start", "update", "evaluation", "samples"):
            self._run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
        # The server's count is authoritative; an offline run has only the local count.
        self._sent = self._run.step if self._run.resumed else progress["rows"]
        self._save_progress()

    def _save_progress(self) -> None:
        write_json(self._directory.wandb_id, {"id": self._run.id, "rows": self._sent})


def _log_in() -> None:
    import wandb

    offline = os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun")
    try:
        logged_in = offline or wandb.login()
    except wandb.Error:
        logged_in = False
    if not logged_in:
        raise UserError("--track wandb: W&B has no API key: run `wandb login`, or set WANDB_MODE=offline")


def _stage(row: Mapping) -> str:
    return row["stage"].replace(" ", "_")


def _metrics(row: Mapping) -> dict[str, float]:
    return {
        name: value
        for name, value in row.items()
        if name != "step" and isinstance(value, int | float) and not isinstance(value, bool)
    }


def _generations(directory: RunDirectory, row: Mapping) -> Iterator[dict]:
    """The generations stored with an evaluation's row."""
    if row["stage"] in ("evaluation", "samples"):
        file: Path = directory.generations(row["step"])
        if file.exists():
            yield from map(json.loads, file.read_text().splitlines())


def _markdown(row: Mapping) -> str:
    metrics = ", ".join(f"{name} {row[name]:.4g}" for name in ("reward", "logratio") if row[name] is not None)
    return f"{row['decoding']}, {metrics}\n\n{_code(row['prompt'])}\n\n{_code(row['completion'])}"


def _code(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())
