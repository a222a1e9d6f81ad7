"""Phases: the log, evaluations and checkpoints at their marks, stops, early ends, and resuming in any phase."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from shiq_jax import stopping
from shiq_jax.errors import UserError
from shiq_jax.runs.callbacks import EvaluatePolicy
from shiq_jax.runs.metrics import MetricsLog, tokens_per_second
from shiq_jax.runs.phases import Ledger, Phase, Plan, run_phases
from shiq_jax.training.batches import DeviceBatch
from shiq_jax.training.state import State


class Shelf:
    """Checkpoints in memory."""

    directory = "the shelf"

    def __init__(self):
        self.kept, self.saved = {}, []

    def latest(self):
        return max(self.kept, default=None)

    def save(self, state, metadata, metrics):
        step = int(state.step)
        if step in self.kept and (self.kept[step][2] or not metrics):
            return
        self.saved.append(step)
        self.kept[step] = state, dict(metadata), dict(metrics)

    def restore(self, into):
        state, metadata, _ = self.kept[self.latest()]
        return state, metadata

    def metrics(self, step):
        return self.kept[step][2] or None

    def wait(self):
        pass

    def close(self):
        pass


def start() -> State:
    return State({"x": jnp.zeros(())}, {}, {}, (), jnp.int32(0))


def adding(amount):
    """An update that adds its batch and a number of its own."""

    def update(state, batch):
        x = state.trainable["x"] * 1.5 + batch + amount
        return state._replace(trainable={"x": x}, step=state.step + 1), {"loss": x}

    return update


def batch(step):
    return DeviceBatch(jnp.float32(step), tokens=5, fill=0.5)


def plan_of(*phases) -> Plan:
    return Plan(phases, optax.identity(), lambda step: 0.5 / (step + 1))


class Evaluating(EvaluatePolicy):
    """Notes where it evaluates and samples."""

    def __init__(self, every):
        self.evaluated, self.sampled = [], []
        super().__init__(self._evaluate, self._sample, every=every)

    def _evaluate(self, state, step, passes):
        self.evaluated.append((step, passes))
        return {"reward": float(step)}

    def _sample(self, state, step, passes):
        self.sampled.append((step, passes))


@pytest.fixture
def ledger(tmp_path):
    def make(shelf, save_every=100, **options):
        return Ledger(MetricsLog(tmp_path / "metrics.jsonl"), shelf, {"seed": 1}, save_every, **options)

    return make


@pytest.mark.parametrize(
    ("evaluate", "save", "evaluated", "saved"),
    [
        (None, 100, [7], [7]),
        (3, 100, [3, 6, 7], [3, 6, 7]),
        (3, 2, [3, 6, 7], [2, 3, 4, 6, 7]),
        (None, 7, [7], [7]),
    ],
)
def test_evaluations_and_saves_come_at_their_marks_and_at_the_end(ledger, evaluate, save, evaluated, saved):
    shelf, evaluation = Shelf(), Evaluating(evaluate)
    run_phases(plan_of(Phase("update", adding(1), batch, 7)), start(), ledger(shelf, save), evaluation)
    assert [step for step, _ in evaluation.evaluated] == evaluated and shelf.saved == saved
    for step, (_, metadata, metrics) in shelf.kept.items():
        assert metadata == {"settings": {"seed": 1}, "phase": "update", "began": 0}
        assert metrics == ({"reward": float(step)} if step in evaluated else {})


def test_generations_are_kept_where_passes_end(ledger):
    evaluation = Evaluating(5)
    phase = Phase("update", adding(1), batch, 7, steps_per_pass=4, pass_ends=[4, 7])
    run_phases(plan_of(phase), start(), ledger(Shelf()), evaluation)
    assert evaluation.sampled == [(4, 1.0)] and evaluation.evaluated == [(5, 1.25), (7, 1.75)]


def test_every_update_is_a_line_of_the_log(ledger):
    made = ledger(Shelf(), before=10, tags={"round": 2})
    phase = Phase("update", adding(1), batch, 3, metrics=lambda done: {"epsilon": done / 10})
    run_phases(plan_of(phase), start(), made)
    rows = made.log.rows()
    assert [row["step"] for row in rows] == [11, 12, 13]
    for number, row in enumerate(rows):
        assert row["stage"] == "update" and row["round"] == 2 and row["tokens"] == 5 and row["fill"] == 0.5
        assert row["epsilon"] == (number + 1) / 10 and row["learning_rate"] == 0.5 / (number + 1)
    assert [row["loss"] for row in rows] == [1.0, 3.5, 8.25]


def two_phases(seen):
    """Three updates of one kind, or two where the log says so, and four of another."""
    first = Phase(
        "public", adding(1), batch, 3, on_end=lambda state: seen.append("end") or state, window=2,
        enough=lambda done: done == 2,
    )  # fmt: skip
    return plan_of(first, Phase("private", adding(100), batch, 4))


@pytest.mark.parametrize("at", range(1, 7))
def test_a_plan_resumes_in_whatever_phase_it_was_stopped(at, ledger, tmp_path):
    seen = []
    whole = run_phases(two_phases(seen), start(), ledger(Shelf(), 1))
    rows = [(row["stage"], row["step"], row["loss"]) for row in ledger(Shelf()).log.rows()]
    assert [row[:2] for row in rows] == [("public", 1), ("public", 2), *(("private", step) for step in (3, 4, 5, 6))]
    assert seen == ["end"]
    (tmp_path / "metrics.jsonl").unlink()

    shelf, saves = Shelf(), Shelf.save

    class Killed(Exception):
        pass

    def save(state, metadata, metrics):
        saves(shelf, state, metadata, metrics)
        if int(state.step) == at:
            raise Killed

    shelf.save = save
    with pytest.raises(Killed):
        run_phases(two_phases([]), start(), ledger(shelf, 1))
    shelf.save = lambda *args: saves(shelf, *args)
    resumed = run_phases(two_phases([]), start(), ledger(shelf, 1))
    assert float(resumed.trainable["x"]) == float(whole.trainable["x"]) and int(resumed.step) == 6
    again = [(row["stage"], row["step"], row["loss"]) for row in ledger(shelf).log.rows()]
    assert again == rows


@pytest.mark.parametrize("at", [2, 3, 5])
def test_a_stop_saves_and_leaves_the_marks_to_the_run_that_resumes(at, ledger):
    shelf = Shelf()

    def stopping_batch(step):
        return batch(step)

    def update(state, item):
        if int(item) == at - 1:
            stopping._received.append(15)
        return adding(1)(state, item)

    evaluation = Evaluating(3)
    try:
        with pytest.raises(stopping.Stopped, match=f"^stopped at update {at} of 5$"):
            run_phases(plan_of(Phase("update", update, stopping_batch, 5)), start(), ledger(shelf), evaluation)
    finally:
        stopping._received.clear()
    assert shelf.latest() == at and not shelf.metrics(at)
    more = Evaluating(3)
    state = run_phases(plan_of(Phase("update", adding(1), batch, 5)), start(), ledger(shelf), more)
    assert int(state.step) == 5
    assert [step for step, _ in evaluation.evaluated + more.evaluated] == [3, 5]


def test_checkpoints_of_other_settings_are_refused(ledger):
    shelf = Shelf()
    plan = plan_of(Phase("update", adding(1), batch, 2))
    run_phases(plan, start(), ledger(shelf))
    other = ledger(shelf)._replace(settings={"seed": 2})
    with pytest.raises(UserError, match="was begun with seed=1, not 2"):
        run_phases(plan, start(), other)


@pytest.mark.parametrize("lse, warned", [(9e-5, True), (2e-4, False), (12.0, False)])
def test_logits_that_seem_normalized_are_warned_of_once(ledger, capsys, lse, warned):
    def update(state, item):
        state, metrics = adding(1)(state, item)
        return state, metrics | {"lse_abs": np.float32(lse)}

    run_phases(plan_of(Phase("update", update, batch, 3)), start(), ledger(Shelf()))
    assert capsys.readouterr().err.count("as if they were normalized already") == warned


def test_throughput_leaves_out_what_compiled():
    rows = [
        {"tokens": 100, "seconds": 50.0, "compiled": True},
        {"tokens": 30, "seconds": 0.5, "compiled": False},
        {"tokens": 10, "seconds": 1.5, "compiled": False},
    ]
    assert tokens_per_second(rows) == 20.0
    assert tokens_per_second(rows[:1]) is None and tokens_per_second([]) is None
