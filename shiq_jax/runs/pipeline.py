"""A run from its options to its summary: warm start, sample, score, keep, annotate, passes, evaluate, export.

Every stage leaves a file or directory that says that it is done, and begins where that file says; so a run that stopped
anywhere goes on with the same calls.
"""

from __future__ import annotations

import contextlib
import math
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from shiq_jax import progress
from shiq_jax.errors import Refusal, disk_refusals
from shiq_jax.models import save_hf
from shiq_jax.models.heads import HEADS, Headed
from shiq_jax.objectives import OBJECTIVES, Objective
from shiq_jax.replay import Buffer
from shiq_jax.runs import private_run, public_phase, report
from shiq_jax import stopping
from shiq_jax.training.annotation import annotate, reference_identity
from shiq_jax.training.baseline import GroupMeanBaseline
from shiq_jax.training.batches import Batches
from shiq_jax.training.checkpoints import Checkpoints
from shiq_jax.runs.options import Job
from shiq_jax.training.evaluation import SHOWN_PROMPTS, SHOWN_SAMPLES, Evaluator
from shiq_jax.runs.ingest import demonstrations, fill_buffer, public_buffer
from shiq_jax.runs.labelling import label, threshold_of
from shiq_jax.training.trainable import learner, learns
from shiq_jax.runs.metrics import MetricsLog
from shiq_jax.training.optimizers import Optimizer
from shiq_jax.runs.passes import Marks, run_passes, tokens_per_second
from shiq_jax.runs.private_run import Private
from shiq_jax.runs.public_phase import PublicData
from shiq_jax.training.reference import Reference
from shiq_jax.runs.run import Run, Use, set_up
from shiq_jax.runs.run_directory import RunDirectory, read_json, refuse_differences, write_json, write_jsonl
from shiq_jax.training.state import State, init_state, split
from shiq_jax.runs.sources import prompts_of
from shiq_jax.runs.trackers import require, trackers
from shiq_jax.training.update import make_update


@progress.shown()
@disk_refusals()
def train(job: Job) -> dict[str, Any]:
    """Run a job to its end, or go on with it, and return its summary.

    Raises:
        Refusal: some input cannot be used; a run that had not begun to learn or sample leaves nothing on disk.
        Stopped: the process was asked to stop, see `shiq_jax.stopping`.
    """
    began = time.monotonic()
    require(job.track)
    if job.privacy.on:
        private_run.check_private_job(job, job.loss.configured())
    directory = RunDirectory.begin(job.directory(), job.settings(), resume=job.resume)
    if directory.summary.exists():
        summary = read_json(directory.summary)
        with contextlib.closing(MetricsLog(directory.metrics, trackers(job.track, directory, job.told()))) as log:
            log.begin()
        report.print_table(f"{directory.path} is complete", report.summary_rows(summary))
        return summary
    with directory.locked(), contextlib.ExitStack() as stack:
        return _complete(job, directory, began, stack)


def _complete(job: Job, directory: RunDirectory, began: float, stack: contextlib.ExitStack) -> dict[str, Any]:
    """What is left of a run, whose directory is this process's own; the stack closes what stays open."""
    try:
        with disk_refusals(directory.path):
            run = set_up(job, directory)
            stack.callback(run.log.close)
            reference = Reference(warm_start(run), run.load)
            model, params = reference.open()
            stopping.check("before the buffer")
            answers = fill_buffer(run, model, params)
            objective = job.loss.configured()
            buffer = _labelled(run, model, answers, objective) if "labels" in objective.needs else answers
            statistics, probe = _annotated(job, model, params, buffer, objective)
            public = None
            if job.public.data:
                there = public_buffer(run, model)
                public = there, _annotated(job, model, params, there, objective)[0]
            stopping.check("before the updates")
            model, params = learner(
                model, params, objective, lora=job.lora.configured(), steering=objective.steering,
                keys=(run.key(Use.ADAPTERS), run.key(Use.HEADS)),
            )  # fmt: skip
            state = passes(run, model, params, reference, buffer, objective, statistics, public)
    except Refusal:
        if not job.resume:
            directory.discard(samples=not job.data)
        raise
    stopping.check("before the export")
    export(run, model, state.params(), directory.export)
    summary = summarise(run, answers, probe, time.monotonic() - began)
    report.draw_learning_curve(run.log, directory.curve, f"{job.objective} on {job.data or job.task}")
    if measured := run.log.rows(public_phase.MEASURED):
        first = len(run.log.rows(public_phase.STAGE))
        title = f"from public data, in Adam's metric; updates after {first} are private"
        report.draw_improvement({"": measured}, directory.improvement, title)
    write_json(directory.summary, summary)
    report.print_table(f"{job.command}: {directory.path}", report.summary_rows(summary))
    return summary


def warm_start(run: Run) -> str | Path:
    """Where the reference's weights are: the task's model, after the job's supervised updates if there are any."""
    job, options = run.job, run.job.warm_start
    if not run.task.demonstrations or job.objective == "sft":
        return run.task.model
    done = run.directory.reference
    if not done.exists():
        model, params = run.load(run.task.model)
        buffer = demonstrations(run, run.directory.warm_start / "buffer", model)
        batches = Batches(
            buffer, "trajectory", options.batch_size, seed=job.seed, mesh=run.mesh, microbatches=job.microbatches,
            row_length=job.row_length,
        )  # fmt: skip
        state = _fit(
            run, model, params, batches, OBJECTIVES["sft"], options.optimizer, options.steps,
            stage="warm start", checkpoints=Checkpoints(run.directory.warm_start / "checkpoints", keep=1),
            key=run.key(Use.WARM_START), marks=Marks(save=job.save_every),
        )  # fmt: skip
        export(run, model, state.params(), done)
    return done


def _labelled(run: Run, model, answers: Buffer, objective: Objective) -> Buffer:
    """The answers as good and bad ones, for an objective that reads labels."""
    job, context = run.job, model.config.max_positions
    threshold = threshold_of(job.data, job.score, job.threshold)
    if job.privacy.on and threshold is None:
        raise Refusal(
            "good or bad by the mean of a prompt's answers is what other units say: give labels, or a --threshold"
        )
    return label(run.directory.labelled, answers, objective, threshold, min(context, job.drop_longer_than or context))


def _annotated(job: Job, model, params, buffer: Buffer, objective: Objective):
    """Reader of the reference's statistics of a buffer, and what the sampler's own were worth, where it is needed."""
    if "references" not in objective.needs:
        return None, None
    identity = reference_identity(model, params)
    probe = annotate(model, params, buffer, identity, prompts_per_batch=job.batch_size, row_length=job.row_length)
    print(f"step-zero probe of the sampler's statistics: {probe or 'there are none'}", file=sys.stderr)
    return buffer.statistics(identity), probe


def passes(
    run: Run, model, params, reference: Reference, buffer: Buffer, objective: Objective, statistics,
    public: tuple[Buffer, Any] | None = None,
) -> State:  # fmt: skip
    """The policy after all passes over the buffer, evaluated on the way; what it was before is evaluation 0.

    public: a buffer of data that a private run need not protect, with its statistics.
    """
    job, options = run.job, run.job.evaluation
    learned = split(params, learns(model, objective))[0]
    private = private_run.begin(run, learned, buffer, objective, statistics) if job.privacy.on else None
    if public is not None:
        private = private.beside(PublicData(run, *public, objective, private.mechanism))
    if private is not None:
        batches = private.batches
    else:
        batches = Batches(
            buffer, objective.unit, job.batch_size, seed=job.seed, statistics=statistics, mesh=run.mesh,
            microbatches=job.microbatches, row_length=job.row_length,
            records=GroupMeanBaseline(buffer) if job.baseline == "group_mean" else None,
        )  # fmt: skip
    if batches.left_out:
        print(f"{batches.left_out} groups hold no two answers of unlike reward and give no pair", file=sys.stderr)
    steps = batches.steps(job.epochs)
    rows = run.task.held_out
    if rows is None:
        rows = prompts_of(buffer, options.prompts, model.config.max_positions - options.max_tokens)
    evaluator = Evaluator(
        model, run.tokenizer, run.stops, rows, run.task.reward, options.max_tokens,
        options.samples_per_prompt, options.prompts_in_flight, options.greedy,
    )  # fmt: skip

    def evaluate(weights, step: int, stage: str = "evaluation", prompts: int | None = None) -> dict[str, float]:
        key = jax.random.fold_in(run.key(Use.EVALUATION), step)
        # What adapters were added to is the reference, and is there already.
        known = reference if model.lora is None else Reference(run.task.model, lambda _: model.switched_off(weights))
        found = evaluator(weights, known if step else None, key, prompts)
        # An evaluation that was written down, but not saved with the policy, is made again.
        run.log.rewind([stage], step - 1)
        done = max(step - (private.before if private else 0), 0)
        where = {"step": step, "pass": round(done / max(batches.steps(1), 1), 3)}
        from_itself = {} if step else {"logratio": 0.0}
        shown = evaluator.shown(found, SHOWN_PROMPTS, SHOWN_SAMPLES)
        run.directory.samples.mkdir(exist_ok=True)
        write_jsonl(run.directory.generations(step), [where | row | from_itself for row in shown])
        run.log.write(stage, step, **found.numbers)
        return found.numbers

    if not run.log.rows("evaluation"):
        evaluate(params, 0)
    # Where public updates turn out to be fewer than planned these are no ends of passes, and shown all the same.
    planned = steps + (private.before if private else 0)
    pass_ends = {planned - steps + batches.steps(number) for number in range(1, int(job.epochs) + 1)}
    metric = "reward" if run.task.reward else None
    return _fit(
        run, model, params, batches, objective, job.optimizer, steps,
        stage="update", checkpoints=Checkpoints(run.directory.checkpoints, keep=job.keep, best=metric),
        key=run.key(Use.UPDATES), microbatches=job.microbatches, private=private,
        marks=Marks(math.ceil(planned / options.times) if options.times else None, job.save_every, show=pass_ends),
        evaluate=lambda state, step: evaluate(state.params(), step),
        show=lambda state, step: evaluate(state.params(), step, "samples", SHOWN_PROMPTS),
    )  # fmt: skip


def export(run: Run, model, params, path: Path) -> None:
    """Weights, configuration and tokenizer in Hugging Face format; the directory appears when it is complete."""
    partial = path.with_name(path.name + ".partial")
    if path.exists():
        return
    shutil.rmtree(partial, ignore_errors=True)
    if isinstance(model, Headed):
        save_hf(model.plain(), {name: part for name, part in params.items() if name != HEADS}, partial)
        model.save(params, partial)
    else:
        save_hf(model, params, partial)
    run.tokenizer.save_pretrained(partial)
    partial.rename(path)


def summarise(run: Run, buffer: Buffer, probe: Mapping | None, seconds: float) -> dict[str, Any]:
    """The numbers of a run, out of its log; `seconds` are those since its start or its last resumption."""
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
        "records": len(buffer),
        "buffer_bytes": buffer.bytes,
        "probe": probe,
        "seconds": seconds,
        "machine": report.machine(),
    }


def _fit(
    run: Run, model, params, batches: Batches, objective: Objective, optimizer: Optimizer, steps: int, *,
    stage: str, checkpoints: Checkpoints, key, marks: Marks, microbatches: int = 1, evaluate: Callable | None = None,
    show: Callable | None = None, private: Private | None = None,
) -> State:  # fmt: skip
    """Update from the newest checkpoint, or from `params`, to the last step; public updates come before private."""
    public, rewound = private.public if private else None, (stage, "evaluation", "samples") if evaluate else (stage,)
    planned = steps + (public.steps if public else 0)
    rule = optimizer.build(planned)
    slow = {name: params[HEADS][name] for name in objective.slow}
    state = init_state(
        model, params, rule, key=key, mesh=run.mesh, targets=lambda _: {HEADS: slow} if slow else {},
        trainable=learns(model, objective),
    )  # fmt: skip
    # Closed also when the passes end early: a save under way is finished before anything else opens the directory.
    with contextlib.closing(checkpoints):
        metadata = {}
        if checkpoints.latest() is not None:
            state, metadata = checkpoints.restore(state)
            refuse_differences(checkpoints.directory, metadata.get("settings") or {}, run.job.told())
            if private:
                private.check(checkpoints.directory, metadata)
        run.log.rewind((*rewound, public_phase.STAGE, public_phase.MEASURED) if public else rewound, int(state.step))
        options = {"mesh": run.mesh, "microbatches": microbatches}
        about = {"settings": run.job.told()}

        def evaluated(state: State, step: int) -> dict[str, float]:
            if public:
                public.look(model, state, step)
            return evaluate(state, step)

        if public and not run.log.rows(public_phase.MEASURED):
            public.look(model, state, int(state.step))
        shared = {
            "log": run.log, "marks": marks, "checkpoints": checkpoints,
            "learning_rate": optimizer.learning_rate_at(planned), "evaluate": evaluated if evaluate else None,
            "show": show,
        }  # fmt: skip
        if public and public.first:
            if metadata.get("stage") != stage:
                before = about | {"stage": public_phase.STAGE, "epsilon": 0.0}
                state = run_passes(
                    make_update(model, objective, rule, **options), state, public.batches, public.steps,
                    stage=public_phase.STAGE, metadata=lambda done: before, enough=public.enough, **shared,
                )  # fmt: skip
                state, metadata = public.changed_over(state), {"before": int(state.step)}
            public.taken = metadata["before"]
            steps += public.taken
        make = make_update if private is None else private.make_update
        return run_passes(
            make(model, objective, rule, **options), state, batches, steps, stage=stage,
            metadata=lambda done: about | {"stage": stage} | (private.metadata(done) if private else {}), **shared,
        )  # fmt: skip
