"""What an update waits for besides itself: `python -m benchmarks.stalls [--quick] --json FILE`.

It waits for the next batch, and for the call that starts a checkpoint.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from benchmarks import ours, rows, works
from benchmarks.rows import Row
from shiq_jax.models import load_hf
from shiq_jax.runs.callbacks import LogUpdates
from shiq_jax.runs.metrics import MetricsLog
from shiq_jax.tasks import fetch
from shiq_jax.tasks.tiny import tiny_directory
from shiq_jax.training.callbacks import SaveCheckpoints
from shiq_jax.training.checkpoints import Checkpoints
from shiq_jax.training.fit import fit


class Stalls(NamedTuple):
    """Seconds, medians.

    Attributes:
        update: of an update during which nothing is written.
        waited: for its batch.
        save: of the call that starts a checkpoint; its files follow in the background.
        written: until they are complete.
        beside: of an update while they are written.
    """

    update: float
    waited: float
    save: float
    written: float
    beside: float


class _Timed(Checkpoints):
    """Notes how long saving took; what the last one still writes is not waited for."""

    def __init__(self, directory: Path):
        super().__init__(directory, keep=1)
        self.steps, self.seconds = [], []

    def save(self, state, metadata, metrics=None) -> None:
        """As it is, timed."""
        self.wait()
        began = time.perf_counter()
        super().save(state, metadata, metrics)
        self.steps.append(int(state.step))
        self.seconds.append(time.perf_counter() - began)


def run(model: str, work: Path, updates: int = 12, every: int = 4) -> Stalls:
    """The loop of a run over a work's groups, a checkpoint after every so many updates."""
    steps = json.loads(work.read_text())
    decoder, params = load_hf(model, remat="full")
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        buffer = ours.filled(place / "buffer", model, decoder, params, steps)
        batches, state, update = ours.training(decoder, params, buffer, "dpo", len(steps[0]))
        log, checkpoints = MetricsLog(place / "metrics.jsonl"), _Timed(place / "checkpoints")
        callbacks = [LogUpdates(log, "update", lambda step: 1e-6), SaveCheckpoints(checkpoints, every=every)]
        state = fit(state, update, batches, start=0, stop=updates, callbacks=callbacks)
        checkpoints.wait()
        began = time.perf_counter()
        checkpoints.save(state._replace(step=state.step + 1), {})
        checkpoints.wait()
        written = time.perf_counter() - began
        rows = [row for row in log.rows("update") if not row["compiled"]]
    after = {step + 1 for step in checkpoints.steps}
    median = lambda name, some: statistics.median(row[name] for row in some)  # noqa: E731
    return Stalls(
        update=median("seconds", [row for row in rows if row["step"] not in after]),
        waited=median("waited", rows),
        save=statistics.median(checkpoints.seconds[:-1]),
        written=written,
        beside=median("seconds", [row for row in rows if row["step"] in after]),
    )


def table(found: Stalls) -> list[Row]:
    """The waits as fractions of an update."""
    kept = f"{found.written:.1f} s until its files are complete; an update beside that {found.beside:.2f} s"
    return [
        Row("input_wait_fraction", found.waited / found.update, "", note=f"of an update of {found.update:.2f} s"),
        Row("checkpoint_call_fraction", found.save / found.update, "", note=kept),
    ]


def measure(quick: bool) -> tuple[list[Row], dict[str, float]]:
    """The rows and the seconds behind them.

    quick: a tiny model and few updates on rows of one shape, of which only the first compiles.
    """
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        model = tiny_directory(place / "model", num_layers=2) if quick else fetch.smollm2()
        works.write(works.WORKS["pairs" if quick else "bfcl_pairs"], place / "work.json", tiny=quick)
        found = run(str(model), place / "work.json", *((6, 2) if quick else ()))
    return table(found), found._asdict()


if __name__ == "__main__":
    rows.command("stalls", __doc__, measure)
