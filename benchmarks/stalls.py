"""Time that the training loop waits for batches and checkpoint calls.

python -m benchmarks.stalls [--quick] --json FILE
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from benchmarks import ours, workloads
from benchmarks.rows import Row, run_benchmark
from shiq_jax.models import load_hf
from shiq_jax.runs.callbacks import LogUpdates
from shiq_jax.runs.metrics import MetricsLog
from shiq_jax.tasks import fetch
from shiq_jax.tasks.tiny import tiny_directory
from shiq_jax.training.callbacks import SaveCheckpoints
from shiq_jax.training.checkpoints import Checkpoints
from shiq_jax.training.fit import fit


class Stalls(NamedTuple):
    """Median seconds.

    Attributes:
        update: an update without a checkpoint write in the background.
        batch_wait: waiting for the next batch.
        save_call: the call that starts a checkpoint, which is written in the background.
        write: a whole checkpoint write.
        update_during_write: an update during a checkpoint write.
    """

    update: float
    batch_wait: float
    save_call: float
    write: float
    update_during_write: float


class _TimedCheckpoints(Checkpoints):
    """Checkpoints that record the duration of each save call, without the wait for the previous write."""

    def __init__(self, directory: Path):
        super().__init__(directory, keep=1)
        self.steps, self.seconds = [], []

    def save(self, state, metadata, metrics=None) -> None:
        """Save a checkpoint and record how long the call took."""
        self.wait()
        start = time.perf_counter()
        super().save(state, metadata, metrics)
        self.steps.append(int(state.step))
        self.seconds.append(time.perf_counter() - start)


def run(model: str, path: Path, updates: int = 12, every: int = 4) -> Stalls:
    """Train on a workload file with a checkpoint after every `every` updates, and time the loop."""
    steps = json.loads(path.read_text())
    decoder, params = load_hf(model, remat="full")
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        buffer = ours.annotated_buffer(root / "buffer", model, decoder, params, steps)
        batches, state, update = ours.training_setup(decoder, params, buffer, "dpo", len(steps[0]))
        log, checkpoints = MetricsLog(root / "metrics.jsonl"), _TimedCheckpoints(root / "checkpoints")
        callbacks = [LogUpdates(log, "update", lambda step: 1e-6), SaveCheckpoints(checkpoints, every=every)]
        state = fit(state, update, batches, start=0, stop=updates, callbacks=callbacks)
        checkpoints.wait()
        start = time.perf_counter()
        checkpoints.save(state._replace(step=state.step + 1), {})
        checkpoints.wait()
        write = time.perf_counter() - start
        logged = [row for row in log.rows("update") if not row["compiled"]]
    after_save = {step + 1 for step in checkpoints.steps}
    return Stalls(
        update=statistics.median(row["seconds"] for row in logged if row["step"] not in after_save),
        batch_wait=statistics.median(row["waited"] for row in logged),
        save_call=statistics.median(checkpoints.seconds[:-1]),
        write=write,
        update_during_write=statistics.median(row["seconds"] for row in logged if row["step"] in after_save),
    )


def table(stalls: Stalls) -> list[Row]:
    """Rows of the waits as fractions of an update."""
    update = f"of an update of {stalls.update:.2f} s"
    write = f"written in {stalls.write:.1f} s; an update during the write takes {stalls.update_during_write:.2f} s"
    return [
        Row("input_wait_fraction", stalls.batch_wait / stalls.update, "", note=update),
        Row("checkpoint_call_fraction", stalls.save_call / stalls.update, "", note=write),
    ]


def measure(quick: bool) -> tuple[list[Row], dict[str, float]]:
    """Rows and the seconds behind them; `quick` trains a tiny model for few updates on rows of one shape."""
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        model = tiny_directory(root / "model", num_layers=2) if quick else fetch.smollm2()
        workloads.write(workloads.WORKLOADS["pairs" if quick else "bfcl_pairs"], root / "workload.json", tiny=quick)
        stalls = run(str(model), root / "workload.json", *((6, 2) if quick else ()))
    # Keys of docs/results/throughput.json.
    keys = ("update", "waited", "save", "written", "beside")
    return table(stalls), dict(zip(keys, stalls, strict=True))


if __name__ == "__main__":
    run_benchmark("stalls", __doc__, measure)
