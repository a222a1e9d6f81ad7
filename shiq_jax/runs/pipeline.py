"""A run from its options to its summary: warm start, rounds, export, report.

Every stage leaves a file or directory that marks it complete, so the same calls resume a run that was stopped anywhere.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from shiq_jax import progress
from shiq_jax.errors import UserError, disk_errors
from shiq_jax.runs import private_run, public_phase, report
from shiq_jax.runs.learning import warm_start
from shiq_jax.runs.metrics import MetricsLog, tokens_per_second
from shiq_jax.runs.options import Job
from shiq_jax.runs.recipes import recipe_of
from shiq_jax.runs.rounds import Recipe, run_rounds
from shiq_jax.runs.run import Run, set_up
from shiq_jax.runs.run_directory import RunDirectory, read_json, write_json
from shiq_jax.runs.trackers import require, trackers
from shiq_jax.training.reference import Reference


@progress.display()
@disk_errors()
def train(job: Job, recipe: Callable[[Job], Recipe] = recipe_of) -> dict[str, Any]:
    """Run a job to its end, or resume it, and return its summary.

    Args:
        job: all options.
        recipe: job -> what its rounds do; by default what the options ask for.

    Raises:
        UserError: some input cannot be used; a run that had not begun to learn or sample leaves nothing on disk.
        Stopped: the process was asked to stop, see `shiq_jax.stopping`.
    """
    began = time.monotonic()
    require(job.track)
    if job.privacy.on:
        private_run.check_private_job(job, job.loss.configured())
    algorithm = recipe(job)
    settings = job.settings() | {"recipe": type(algorithm).__name__}
    directory = RunDirectory.begin(job.directory(), settings, resume=job.resume)
    settings = job.public_settings(settings)
    if directory.summary.exists():
        summary = read_json(directory.summary)
        with contextlib.closing(MetricsLog(directory.metrics, trackers(job.track, directory, settings))) as log:
            log.begin()
        report.print_table(f"{directory.path} is complete", report.summary_rows(summary))
        return summary
    with directory.locked(), contextlib.ExitStack() as stack:
        try:
            with disk_errors(directory.path):
                run = set_up(job, directory, settings)
                stack.callback(run.log.close)
                rounds = run_rounds(run, algorithm, Reference(warm_start(run), run.load))
                # A run that was killed between its last line and its summary may have left half a line.
                run.log.begin()
        except UserError:
            if not job.resume:
                directory.discard(samples=not job.data)
            raise
        return _report(run, rounds, time.monotonic() - began)


def _report(run: Run, rounds: Sequence[Mapping[str, Any]], seconds: float) -> dict[str, Any]:
    """Draw the figures, write the summary, print the table."""
    job, directory = run.job, run.directory
    summary = summarise(run, rounds, seconds)
    report.draw_learning_curve(run.log, directory.curve, f"{job.objective} on {job.data or job.task}")
    if measured := run.log.rows(public_phase.MEASURED):
        first = len(run.log.rows(public_phase.STAGE))
        title = f"from public data, in Adam's metric; updates after {first} are private"
        report.draw_improvement({"": measured}, directory.improvement, title)
    write_json(directory.summary, summary)
    report.print_table(f"{job.command}: {directory.path}", report.summary_rows(summary))
    return summary


def summarise(run: Run, rounds: Sequence[Mapping[str, Any]], seconds: float) -> dict[str, Any]:
    """The numbers of a run.

    rounds: what `run_rounds` returned. seconds: since the start or the last resumption.
    """
    evaluations, updates = run.log.rows("evaluation"), run.log.rows("update")
    before, after = evaluations[0], evaluations[-1]
    names = [prefix + name for prefix in ("", "greedy_") for name in ("reward", "accuracy")]
    scores = {
        f"{name}{error}_{when}": row.get(name + error)
        for name in names
        for when, row in (("before", before), ("after", after))
        for error in ("", "_stderr")
    }
    return {
        "command": run.job.command,
        "objective": run.job.objective,
        "seed": run.job.seed,
        **scores,
        "kl": after["kl"],
        "kl_stderr": after["kl_stderr"],
        "tokens_per_second": tokens_per_second(updates),
        "updates": len(updates),
        "records": sum(each["records"] for each in rounds),
        "buffer_bytes": sum(each["buffer_bytes"] for each in rounds),
        "probe": rounds[-1]["probe"],
        "seconds": seconds,
        "machine": report.machine(),
    }
