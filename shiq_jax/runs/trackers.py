"""TensorBoard and Weights & Biases on request: both follow the log of a run, which stays the source of truth."""

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

# The package that each tracker imports; the extra that installs it has the tracker's name.
PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}


def require(names: Sequence[str]) -> None:
    """Check that trackers are available before a run writes anything.

    Raises:
        UserError: a package is not installed, or W&B has no API key.
    """
    for name in names:
        if importlib.util.find_spec(PACKAGES[name]) is None:
            raise UserError(
                f"--track {name} needs the package {PACKAGES[name]}, which is not installed: pip install "
                f"'shiq_jax[{name}]', or leave --track {name} out (metrics.jsonl is always written)"
            )
    if "wandb" in names:
        _log_in()


def trackers(names: Sequence[str], directory: RunDirectory, settings: Mapping[str, Any]) -> list[Tracker]:
    """The trackers of a run by name; none has begun yet.

    Args:
        names: "tensorboard", "wandb".
        directory: where their files go; its `samples/` has the generations of a row.
        settings: the run's options.
    """
    kinds = {"tensorboard": TensorBoard, "wandb": WandB}
    return [kinds[name](directory, settings) for name in dict.fromkeys(names)]


class TensorBoard:
    """Event files in `tensorboard/`, rewritten from the log whenever a run begins or resumes.

    So no point is doubled or left over after an interruption. `purge_step` could not do that, because the steps of the
    warm start and those of the passes both count from 1.
    """

    def __init__(self, directory: RunDirectory, settings: Mapping[str, Any]):
        self._directory, self._settings, self._writer = directory, settings, None

    @hosts.on_writer
    def begin(self, rows: list[dict]) -> None:
        """Replace the event files by one with the settings and all rows."""
        from tensorboardX import SummaryWriter

        self.close()
        self._directory.tensorboard.mkdir(exist_ok=True)
        for file in self._directory.tensorboard.glob("events.out.tfevents.*"):
            file.unlink()
        # The purge is for a viewer that has read the files before.
        self._writer = SummaryWriter(str(self._directory.tensorboard), purge_step=0, flush_secs=10)
        self._writer.add_text("settings", _code(json.dumps(self._settings, indent=2, default=str)), 0)
        for row in rows:
            self.write(row)

    def write(self, row: dict) -> None:
        """One scalar `stage/name` per number, and the row's generations as text."""
        for name, value in _numbers(row).items():
            self._writer.add_scalar(f"{_stage(row)}/{name}", value, row["step"])
        for number, text in enumerate(map(_markdown, _generations(self._directory, row))):
            self._writer.add_text(f"samples/{number:02d}", text, row["step"])

    def close(self) -> None:
        """Flush and close the file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class WandB:
    """One W&B run per run directory, whose id and number of sent rows are in `wandb.json`.

    A row's W&B step is its line number in the log. W&B cannot delete a point, so a resumed run sends only the lines
    that were not sent before; the lines that it writes again are the same.
    """

    def __init__(self, directory: RunDirectory, settings: Mapping[str, Any]):
        self._directory, self._settings, self._run = directory, settings, None

    def begin(self, rows: list[dict]) -> None:
        """Open or resume the W&B run, and send the rows that it lacks."""
        if self._run is None:
            self._open()
        self._line = 0
        for row in rows:
            self.write(row)

    def write(self, row: dict) -> None:
        """Send the row with its generations as a table, unless it was sent before."""
        line, self._line = self._line, self._line + 1
        if line < self._sent:
            return
        values = {f"{_stage(row)}/{name}": value for name, value in _numbers(row).items()}
        if generations := list(_generations(self._directory, row)):
            import wandb

            columns = list(generations[0])
            table = wandb.Table(columns=columns, data=[[each[name] for name in columns] for each in generations])
            values[f"{_stage(row)}/generations"] = table
        self._run.log(values | {f"{_stage(row)}/step": row["step"]}, step=line, commit=True)
        self._sent = line + 1
        self._remember()

    def close(self) -> None:
        """Finish the W&B run."""
        if self._run is not None:
            self._run.finish()
            self._run = None

    def _open(self) -> None:
        import wandb

        file = self._directory.wandb_id
        known = json.loads(file.read_text()) if file.exists() else {"id": secrets.token_hex(4), "rows": 0}
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "shiq_jax"),
                name=self._directory.path.name,
                id=known["id"],
                resume="allow",
                dir=str(self._directory.path),
                config=dict(self._settings),
                settings=wandb.Settings(console="off"),
            )
        except wandb.Error as error:
            raise UserError(f"--track wandb: W&B does not open a run ({error}): mend that, or leave it out") from error
        for stage in ("warm_start", "update", "evaluation", "samples"):
            self._run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
        # The server's count is authoritative; offline there is only our own.
        self._sent = self._run.step if self._run.resumed else known["rows"]
        self._remember()

    def _remember(self) -> None:
        write_json(self._directory.wandb_id, {"id": self._run.id, "rows": self._sent})


def _log_in() -> None:
    import wandb

    offline = os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun")
    try:
        known = offline or wandb.login()
    except wandb.Error:
        known = False
    if not known:
        raise UserError("--track wandb: W&B knows no API key: run `wandb login`, or set WANDB_MODE=offline")


def _stage(row: Mapping) -> str:
    return row["stage"].replace(" ", "_")


def _numbers(row: Mapping) -> dict[str, float]:
    return {
        name: value
        for name, value in row.items()
        if name != "step" and isinstance(value, int | float) and not isinstance(value, bool)
    }


def _generations(directory: RunDirectory, row: Mapping) -> Iterator[dict]:
    """The generations that were stored with an evaluation's row."""
    if row["stage"] in ("evaluation", "samples"):
        file: Path = directory.generations(row["step"])
        if file.exists():
            yield from map(json.loads, file.read_text().splitlines())


def _markdown(row: Mapping) -> str:
    facts = ", ".join(f"{name} {row[name]:.4g}" for name in ("reward", "logratio") if row[name] is not None)
    return f"{row['decoding']}, {facts}\n\n{_code(row['prompt'])}\n\n{_code(row['completion'])}"


def _code(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())
