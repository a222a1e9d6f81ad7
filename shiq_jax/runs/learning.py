"""Training plans of non-private runs, and their execution."""

from __future__ import annotations

import sys

from shiq_jax.models.heads import HEADS
from shiq_jax.objectives import OBJECTIVES
from shiq_jax.runs import public_phase
from shiq_jax.runs.evaluations import STAGES, Evaluations
from shiq_jax.runs.export import export
from shiq_jax.runs.ingest import import_demonstrations
from shiq_jax.runs.phases import Outputs, Phase, Plan, epoch_ends, run_phases
from shiq_jax.runs.round import LearningProblem, Round
from shiq_jax.runs.run import Run
from shiq_jax.training.baseline import GroupMeanBaseline
from shiq_jax.training.batches import Batches
from shiq_jax.training.checkpoints import Checkpoints
from shiq_jax.training.state import State, init_state
from shiq_jax.training.trainable import trainable_filter
from shiq_jax.training.update import make_update


def training_plan(round: Round, problem: LearningProblem) -> Plan:
    """A single phase of `--epochs` passes over the buffer."""
    run, job, objective, buffer = round.run, round.run.job, problem.objective, problem.buffer
    batches = Batches(
        buffer, objective.unit, job.batch_size, seed=run.seed(round.number), references=problem.references,
        mesh=run.mesh, microbatches=job.microbatches, row_length=job.row_length,
        records=GroupMeanBaseline(buffer) if job.baseline == "group_mean" else None,
    )  # fmt: skip
    if batches.skipped:
        print(
            f"skipped {batches.skipped} groups: all their answers have the same reward, so they form no pair",
            file=sys.stderr,
        )
    steps = batches.steps(job.epochs)
    optimizer = job.optimizer.build(steps)
    phase = Phase(
        "update", make_update(problem.model, objective, optimizer, mesh=run.mesh, microbatches=job.microbatches),
        batches, steps, steps_per_epoch=max(batches.steps(1), 1), epoch_ends=epoch_ends(batches, job.epochs),
        records=batches.records,
    )  # fmt: skip
    return Plan([phase], optimizer, job.optimizer.learning_rate_at(steps))


def execute_plan(round: Round, problem: LearningProblem, params, plan: Plan) -> State:
    """Execute a plan with its evaluations and return the last state; the first round also starts with an evaluation.

    params: parameters of `problem.model`; donated to the state.
    """
    run, job = round.run, round.run.job
    evaluations = Evaluations(round, problem)
    if not round.number and not run.log.rows("evaluation"):
        evaluations(params, 0)
    targets = {name: params[HEADS][name] for name in problem.objective.target_heads}
    state = init_state(
        problem.model, params, plan.optimizer, mesh=run.mesh, targets=lambda _: {HEADS: targets} if targets else {},
        trainable=trainable_filter(problem.model, problem.objective),
    )  # fmt: skip
    checkpoints = Checkpoints(round.directory.checkpoints, keep=job.keep, best="reward" if run.task.reward else None)
    outputs = Outputs(run.log, checkpoints, run.settings, job.save_every, round.step_offset, round.tags)
    stages = (*STAGES, public_phase.STAGE, public_phase.DIAGNOSTICS_STAGE)
    return run_phases(plan, state, outputs, evaluations.callback(plan), stages)


def warm_start(run: Run):
    """Run the job's warm start, if any, and return path or hub id of the reference: its export or the task's model."""
    job, options = run.job, run.job.warm_start
    if not run.task.demonstrations or job.objective == "sft":
        return run.task.model
    reference = run.directory.reference
    if not reference.exists():
        model, params = run.load(run.task.model)
        batches = Batches(
            import_demonstrations(run, run.directory.warm_start / "buffer", model), "trajectory", options.batch_size,
            seed=job.seed, mesh=run.mesh, microbatches=job.microbatches, row_length=job.row_length,
        )  # fmt: skip
        optimizer = options.optimizer.build(options.steps)
        update = make_update(model, OBJECTIVES["sft"], optimizer, mesh=run.mesh)
        phase = Phase("warm start", update, batches, options.steps, records=batches.records)
        plan = Plan([phase], optimizer, options.optimizer.learning_rate_at(options.steps))
        state = init_state(model, params, optimizer, mesh=run.mesh)
        checkpoints = Checkpoints(run.directory.warm_start / "checkpoints", keep=1)
        state = run_phases(plan, state, Outputs(run.log, checkpoints, run.settings, job.save_every))
        export(run, model, state.params(), reference)
    return reference
