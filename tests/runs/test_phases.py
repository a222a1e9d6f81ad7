"""Phases: schedule of log lines, evaluations and checkpoints, stop requests, early stopping, resume in any phase."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from shiq_jax import stopping
from shiq_jax.errors import UserError
from shiq_jax.runs.callbacks import EvaluatePolicy
from shiq_jax.runs.metrics import MetricsLog, tokens_per_second
from shiq_jax.runs.phases import Outputs, Phase, Plan, run_phases
from shiq_jax.training.batches import DeviceBatch
from shiq_jax.training.state import State


class MemoryCheckpoints:
    """Checkpoints in memory."""

    directory = "memory"

    def __init__(self):
        self.checkpoints, self.saved_steps = {}, []

    def latest(self):
        return max(self.checkpoints, default=None)

    def save(self, state, metadata, metrics):
        step = int(state.step)
        if step in self.checkpoints and (self.checkpoints[step][2] or not metrics):
            return
        self.saved_steps.append(step)
        self.checkpoints[step] = state, dict(metadata), dict(metrics)

    def restore(self, target):
        state, metadata, _ = self.checkpoints[self.latest()]
        return state, metadata

    def metrics(self, step):
        return self.checkpoints[step][2] or None

    def wait(self):
        pass

    def close(self):
        pass


def initial_state() -> State:
    return State({"x": jnp.zeros(())}, {}, {}, (), jnp.int32(0))


def update_adding(amount):
    """An update that adds the batch and a constant, so that its result depends on the order of updates."""

    def update(state, batch):
        x = state.trainable["x"] * 1.5 + batch + amount
        return state._replace(trainable={"x": x}, step=state.step + 1), {"loss": x}

    return update


def batch(step):
    return DeviceBatch(jnp.float32(step), tokens=5, fill=0.5)


def make_plan(*phases) -> Plan:
    return Plan(phases, optax.identity(), lambda step: 0.5 / (step + 1))


class RecordingEvaluation(EvaluatePolicy):
    """Records (step, epoch) of every evaluation and sampling."""

    def __init__(self, every):
        self.evaluated, self.sampled = [], []
        super().__init__(self._evaluate, self._sample, every=every)

    def _evaluate(self, state, step, epoch):
        self.evaluated.append((step, epoch))
        return {"reward": float(step)}

    def _sample(self, state, step, epoch):
        self.sampled.append((step, epoch))


@pytest.fixture
def make_outputs(tmp_path):
    def make(checkpoints, save_every=100, **kwargs):
        return Outputs(MetricsLog(tmp_path / "metrics.jsonl"), checkpoints, {"seed": 1}, save_every, **kwargs)

    return make


@pytest.mark.parametrize(
    ("evaluate_every", "save_every", "evaluated", "saved"),
    [
        (None, 100, [7], [7]),
        (3, 100, [3, 6, 7], [3, 6, 7]),
        (3, 2, [3, 6, 7], [2, 3, 4, 6, 7]),
        (None, 7, [7], [7]),
    ],
)
def test_evaluations_and_saves_follow_their_schedules(make_outputs, evaluate_every, save_every, evaluated, saved):
    checkpoints, evaluation = MemoryCheckpoints(), RecordingEvaluation(evaluate_every)
    phase = Phase("update", update_adding(1), batch, 7)
    run_phases(make_plan(phase), initial_state(), make_outputs(checkpoints, save_every), evaluation)
    assert [step for step, _ in evaluation.evaluated] == evaluated and checkpoints.saved_steps == saved
    for step, (_, metadata, metrics) in checkpoints.checkpoints.items():
        assert metadata == {"settings": {"seed": 1}, "phase": "update", "began": 0}
        assert metrics == ({"reward": float(step)} if step in evaluated else {})


def test_generations_are_sampled_at_epoch_ends(make_outputs):
    evaluation = RecordingEvaluation(5)
    phase = Phase("update", update_adding(1), batch, 7, steps_per_epoch=4, epoch_ends=[4, 7])
    run_phases(make_plan(phase), initial_state(), make_outputs(MemoryCheckpoints()), evaluation)
    assert evaluation.sampled == [(4, 1.0)] and evaluation.evaluated == [(5, 1.25), (7, 1.75)]


def test_every_update_is_logged(make_outputs):
    outputs = make_outputs(MemoryCheckpoints(), step_offset=10, tags={"round": 2})
    phase = Phase("update", update_adding(1), batch, 3, metrics=lambda step: {"epsilon": step / 10})
    run_phases(make_plan(phase), initial_state(), outputs)
    rows = outputs.log.rows()
    assert [row["step"] for row in rows] == [11, 12, 13]
    for number, row in enumerate(rows):
        assert row["stage"] == "update" and row["round"] == 2 and row["tokens"] == 5 and row["fill"] == 0.5
        assert row["epsilon"] == (number + 1) / 10 and row["learning_rate"] == 0.5 / (number + 1)
    assert [row["loss"] for row in rows] == [1.0, 3.5, 8.25]


def two_phases(events):
    """A phase of three updates that ends early after two, and a phase of four updates."""
    first = Phase(
        "public", update_adding(1), batch, 3, on_end=lambda state: events.append("end") or state, check_every=2,
        should_end=lambda step: step == 2,
    )  # fmt: skip
    return make_plan(first, Phase("private", update_adding(100), batch, 4))


@pytest.mark.parametrize("killed_at", range(1, 7))
def test_plan_resumes_in_any_phase(killed_at, make_outputs, tmp_path):
    events = []
    uninterrupted = run_phases(two_phases(events), initial_state(), make_outputs(MemoryCheckpoints(), 1))
    rows = [(row["stage"], row["step"], row["loss"]) for row in make_outputs(MemoryCheckpoints()).log.rows()]
    assert [row[:2] for row in rows] == [("public", 1), ("public", 2), *(("private", step) for step in (3, 4, 5, 6))]
    assert events == ["end"]
    (tmp_path / "metrics.jsonl").unlink()

    checkpoints = MemoryCheckpoints()

    class Killed(Exception):
        pass

    def save_and_crash(state, metadata, metrics):
        MemoryCheckpoints.save(checkpoints, state, metadata, metrics)
        if int(state.step) == killed_at:
            raise Killed

    checkpoints.save = save_and_crash
    with pytest.raises(Killed):
        run_phases(two_phases([]), initial_state(), make_outputs(checkpoints, 1))
    del checkpoints.save
    resumed = run_phases(two_phases([]), initial_state(), make_outputs(checkpoints, 1))
    assert float(resumed.trainable["x"]) == float(uninterrupted.trainable["x"]) and int(resumed.step) == 6
    resumed_rows = [(row["stage"], row["step"], row["loss"]) for row in make_outputs(checkpoints).log.rows()]
    assert resumed_rows == rows


@pytest.mark.parametrize("stopped_at", [2, 3, 5])
def test_stop_request_saves_and_leaves_evaluation_to_the_resumed_run(stopped_at, make_outputs):
    checkpoints = MemoryCheckpoints()

    def update_requesting_stop(state, item):
        if int(item) == stopped_at - 1:
            stopping._received.append(15)
        return update_adding(1)(state, item)

    evaluation = RecordingEvaluation(3)
    plan = make_plan(Phase("update", update_requesting_stop, batch, 5))
    try:
        with pytest.raises(stopping.Stopped, match=f"^stopped at update {stopped_at} of 5$"):
            run_phases(plan, initial_state(), make_outputs(checkpoints), evaluation)
    finally:
        stopping._received.clear()
    assert checkpoints.latest() == stopped_at and not checkpoints.metrics(stopped_at)
    resumed_evaluation = RecordingEvaluation(3)
    plan = make_plan(Phase("update", update_adding(1), batch, 5))
    state = run_phases(plan, initial_state(), make_outputs(checkpoints), resumed_evaluation)
    assert int(state.step) == 5
    assert [step for step, _ in evaluation.evaluated + resumed_evaluation.evaluated] == [3, 5]


def test_checkpoint_with_other_settings_is_an_error(make_outputs):
    checkpoints = MemoryCheckpoints()
    plan = make_plan(Phase("update", update_adding(1), batch, 2))
    run_phases(plan, initial_state(), make_outputs(checkpoints))
    outputs = make_outputs(checkpoints)._replace(settings={"seed": 2})
    with pytest.raises(UserError, match="was started with seed=1, not 2"):
        run_phases(plan, initial_state(), outputs)


@pytest.mark.parametrize("lse, warned", [(9e-5, True), (2e-4, False), (12.0, False)])
def test_normalized_logits_are_warned_about_once(make_outputs, capsys, lse, warned):
    def update(state, item):
        state, metrics = update_adding(1)(state, item)
        return state, metrics | {"lse_abs": np.float32(lse)}

    plan = make_plan(Phase("update", update, batch, 3))
    run_phases(plan, initial_state(), make_outputs(MemoryCheckpoints()))
    assert capsys.readouterr().err.count("seem to be normalized") == warned


def test_throughput_excludes_compilation():
    rows = [
        {"tokens": 100, "seconds": 50.0, "compiled": True},
        {"tokens": 30, "seconds": 0.5, "compiled": False},
        {"tokens": 10, "seconds": 1.5, "compiled": False},
    ]
    assert tokens_per_second(rows) == 20.0
    assert tokens_per_second(rows[:1]) is None and tokens_per_second([]) is None
