"""A complete run: warm start, rounds, export, report.

Every stage leaves a file or directory that marks it complete, so repeating the call resumes an interrupted run.
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
from shiq_jax.runs.recipes import select_recipe
from shiq_jax.runs.rounds import Recipe, run_rounds
from shiq_jax.runs.run import Run, set_up
from shiq_jax.runs.run_directory import RunDirectory, read_json, write_json
from shiq_jax.runs.trackers import check_available, create_trackers
from shiq_jax.training.reference import Reference


@progress.display()
@disk_errors()
def train(job: Job, recipe: Callable[[Job], Recipe] = select_recipe) -> dict[str, Any]:
    """Run a job to completion, or resume it, and return its summary.

    Args:
        job: all options.
        recipe: job -> recipe of its rounds; by default selected by the options.

    Raises:
        UserError: an input is invalid; a run that has not sampled or trained yet is deleted.
        Stopped: a stop was requested, see `shiq_jax.stopping`.
    """
    start = time.monotonic()
    check_available(job.track)
    if job.privacy.enabled:
        private_run.check_private_job(job, job.loss.build())
    job_recipe = recipe(job)
    settings = job.settings() | {"recipe": type(job_recipe).__name__}
    directory = RunDirectory.begin(job.directory(), settings, resume=job.resume)
    settings = job.public_settings(settings)
    if directory.summary.exists():
        summary = read_json(directory.summary)
        with contextlib.closing(MetricsLog(directory.metrics, create_trackers(job.track, directory, settings))) as log:
            log.begin()
        report.print_table(f"{directory.path} is complete", report.summary_rows(summary))
        return summary
    with directory.locked(), contextlib.ExitStack() as stack:
        try:
            with disk_errors(directory.path):
                run = set_up(job, directory, settings)
                stack.callback(run.log.close)
                rounds = run_rounds(run, job_recipe, Reference(warm_start(run), run.load))
                # Drops a truncated last line of a run that was killed before its summary.
                run.log.begin()
        except UserError:
            if not job.resume:
                directory.discard(samples=not job.data)
            raise
        return _report(run, rounds, time.monotonic() - start)


def _report(run: Run, rounds: Sequence[Mapping[str, Any]], seconds: float) -> dict[str, Any]:
    """Draw the figures, write the summary, print the table."""
    job, directory = run.job, run.directory
    summary = summarize(run, rounds, seconds)
    report.draw_learning_curve(run.log, directory.curve, f"{job.objective} on {job.data or job.task}")
    if diagnostics := run.log.rows(public_phase.DIAGNOSTICS_STAGE):
        public_updates = len(run.log.rows(public_phase.STAGE))
        title = f"estimated on public data, in Adam's metric; private updates start after update {public_updates}"
        report.draw_improvement({"": diagnostics}, directory.improvement, title)
    write_json(directory.summary, summary)
    report.print_table(f"{job.command}: {directory.path}", report.summary_rows(summary))
    return summary


def summarize(run: Run, rounds: Sequence[Mapping[str, Any]], seconds: float) -> dict[str, Any]:
    """The content of summary.json.

    rounds: result of `run_rounds`. seconds: time since the start or the last resumption.
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
        "records": sum(round["records"] for round in rounds),
        "buffer_bytes": sum(round["buffer_bytes"] for round in rounds),
        "probe": rounds[-1]["probe"],
        "seconds": seconds,
        "machine": report.machine(),
    }
