"""The loop around the update step: order of the data, log, marks, going on after a stop, and numbers gone bad."""

import dataclasses
import itertools
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shiq_jax.errors import Refusal
from shiq_jax.objectives import OBJECTIVES
from shiq_jax.replay import Buffer, Schedule, bundles
from shiq_jax.training.batches import Batches
from shiq_jax.training.checkpoints import Checkpoints
from shiq_jax.runs.metrics import MetricsLog
from shiq_jax.training.optimizers import Optimizer
from shiq_jax.runs.passes import Marks, run_passes, tokens_per_second
from shiq_jax.training.state import State, init_state
from shiq_jax.training.update import make_update

RATE = Optimizer("adamw", learning_rate=1e-2, schedule="constant", warmup=0)
RULE = RATE.build(20)
TIMING = ("seconds", "waited", "compiled")


@pytest.fixture(scope="module")
def batches(records, tmp_path_factory):
    buffer = Buffer.create(tmp_path_factory.mktemp("replay") / "buffer")
    buffer.append(records)
    # Rows in multiples of four: then every batch has the same shape, and one program serves them all.
    return Batches(buffer, "trajectory", 3, seed=5, microbatches=4)


@pytest.fixture(scope="module")
def update(model):
    """Maximum likelihood with adamw; one program for the whole file."""
    return make_update(model, OBJECTIVES["sft"], RULE)


@pytest.fixture
def fresh(on_mesh):
    def make():
        model, params = on_mesh()
        return init_state(model, params, RULE, key=jax.random.key(0))

    return make


class Stub:
    """An update that only counts, and remembers its batches."""

    def __init__(self):
        self.seen = []

    def __call__(self, state, batch):
        self.seen.append(batch)
        metrics = {"loss": jnp.float32(len(self.seen)), "grad_norm": jnp.float32(1)}
        return state._replace(step=state.step + 1), metrics


class Shelf:
    """Checkpoints that only remember what was asked of them."""

    def __init__(self):
        self.saved, self.waited = [], False

    def save(self, state, metadata, metrics):
        self.saved.append((int(state.step), metadata, metrics))

    def wait(self):
        self.waited = True


def counting(step=0) -> State:
    return State({}, {}, {}, (), jnp.int32(step), jax.random.key(0))


@pytest.fixture
def run(tmp_path, batches):
    """`run_passes` with a log of its own."""

    def go(update, state, steps, *, checkpoints, batches=batches, **options):
        log = MetricsLog(tmp_path / "metrics.jsonl")
        options = {"stage": "update", "metadata": lambda done: {}, "learning_rate": RATE.learning_rate_at(20)} | options
        return run_passes(update, state, batches, steps, log=log, checkpoints=checkpoints, **options), log

    return go


def test_the_data_come_in_the_order_of_the_schedule(run, batches):
    stub = Stub()
    run(stub, counting(), 7, checkpoints=Shelf())
    schedule, drawn = Schedule(len(batches.bundles), 3, seed=5), bundles(batches.records, "trajectory")
    assert len(stub.seen) == 7
    for step, batch in enumerate(stub.seen):
        wanted = [member for number in schedule.indices(step) for example in drawn[number] for member in example]
        assert sorted(batches(step).members[batches(step).members >= 0]) == sorted(wanted)
        jax.tree.map(np.testing.assert_array_equal, batch, batches(step).batch)
        np.testing.assert_allclose(
            np.sum(batch.example.rewards), sum(batches.records[member].rewards.sum() for member in wanted), atol=1e-4
        )
    one_pass = [member for step in range(7) for member in batches(step).members.ravel() if member >= 0]
    assert set(one_pass) == set(range(len(batches.records)))


def test_a_run_that_goes_on_sees_the_batches_that_are_left(run, batches):
    stub = Stub()
    run(stub, counting(4), 7, checkpoints=Shelf())
    assert len(stub.seen) == 3
    for step, batch in zip((4, 5, 6), stub.seen, strict=True):
        jax.tree.map(np.testing.assert_array_equal, batch, batches(step).batch)


def test_a_run_that_is_over_does_nothing(run):
    stub, shelf = Stub(), Shelf()
    state, log = run(stub, counting(7), 7, checkpoints=shelf)
    assert not stub.seen and not shelf.saved and not log.rows() and int(state.step) == 7


@pytest.mark.parametrize(
    ("marks", "evaluated", "saved"),
    [
        (Marks(), [7], [7]),
        (Marks(evaluate=3), [3, 6, 7], [3, 6, 7]),
        (Marks(evaluate=3, save=2), [3, 6, 7], [2, 3, 4, 6, 7]),
        (Marks(save=7), [7], [7]),
    ],
)
def test_evaluations_and_saves_come_at_their_marks_and_at_the_end(run, marks, evaluated, saved):
    shelf, calls = Shelf(), []

    def evaluate(state, step):
        assert int(state.step) == step
        calls.append(step)
        return {"reward": float(step)}

    run(Stub(), counting(), 7, checkpoints=shelf, marks=marks, evaluate=evaluate, metadata=lambda done: {"run": 1})
    assert calls == evaluated and [step for step, _, _ in shelf.saved] == saved and shelf.waited
    for step, metadata, metrics in shelf.saved:
        assert metadata == {"run": 1}
        assert metrics == ({"reward": float(step)} if step in evaluated else {})


def test_every_update_is_a_line_of_the_log(run, update, fresh, batches):
    rate = Optimizer(learning_rate=0.3, schedule="linear", warmup=0.5).learning_rate_at(3)
    _, log = run(update, fresh(), 3, checkpoints=Shelf(), stage="warm start", learning_rate=rate)
    rows = log.rows("warm start")
    assert [row["step"] for row in rows] == [1, 2, 3] and len(log.rows()) == 3
    state = fresh()
    for step, row in enumerate(rows):
        state, metrics = update(state, batches(step).batch)
        assert {name: row[name] for name in metrics} == {name: float(value) for name, value in metrics.items()}
        members = [member for member in batches(step).members.ravel() if member >= 0]
        np.testing.assert_allclose(row["learning_rate"], rate(step))
        assert row["tokens"] == _shared_tokens(batches, members) and 0 < row["fill"] <= 1
        assert row["weight"] == sum(len(batches.records[member].rewards) for member in members)
    assert rows[0]["loss"] != rows[1]["loss"]


def test_a_run_that_was_stopped_ends_in_the_same_bits(run, update, fresh, tmp_path):
    whole, log = run(update, fresh(), 5, checkpoints=Shelf())
    uninterrupted = log.rows()
    log.path.unlink()

    checkpoints = Checkpoints(tmp_path / "checkpoints")

    class Stopped(Exception):
        pass

    class Stopping:
        """Dies at its fourth update, two updates after the last save."""

        def __init__(self):
            self.calls = itertools.count(1)

        def __call__(self, state, batch):
            if next(self.calls) == 4:
                raise Stopped
            return update(state, batch)

    with pytest.raises(Stopped):
        run(Stopping(), fresh(), 5, checkpoints=checkpoints, marks=Marks(save=2), metadata=lambda done: {"seed": 5})
    assert checkpoints.latest() == 2
    checkpoints.close()

    checkpoints = Checkpoints(tmp_path / "checkpoints")
    state, metadata = checkpoints.restore(fresh())
    assert int(state.step) == 2 and metadata == {"seed": 5}
    log.rewind(["update"], int(state.step))
    again, log = run(update, state, 5, checkpoints=checkpoints, marks=Marks(save=2))
    jax.tree.map(np.testing.assert_array_equal, _bits(again), _bits(whole))
    assert [_timeless(row) for row in log.rows()] == [_timeless(row) for row in uninterrupted]
    assert checkpoints.latest() == 5
    jax.tree.map(np.testing.assert_array_equal, _bits(checkpoints.restore(fresh())[0]), _bits(whole))
    checkpoints.close()


def test_a_loss_that_is_not_finite_is_refused_and_the_checkpoint_before_it_stays(
    run, model, fresh, records, make_buffer, tmp_path
):
    """One reward too large for its square; the record is sound by itself, so only the loss can tell."""
    huge = dataclasses.replace(records[3], rewards=np.full_like(records[3].rewards, 1e30))
    zeros = [(np.zeros_like(record.rewards),) * 2 for record in records]
    broken = make_buffer([*records[:3], huge, *records[4:]])
    seed = next(
        seed
        for seed in range(100)
        if [3 in Batches(broken, "trajectory", 3, seed=seed)(step).members for step in range(3)] == [False, False, True]
    )
    batches = Batches(broken, "trajectory", 3, seed=seed, references={"reference": zeros}, microbatches=4)
    members = sorted(int(member) for member in batches(2).members.ravel() if member >= 0)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    shiq = make_update(model, OBJECTIVES["shiq"], RULE)
    with pytest.raises(Refusal) as refused:
        run(shiq, fresh(), 6, checkpoints=checkpoints, batches=batches, marks=Marks(save=1))
    named = f"records {', '.join(map(str, members))} of groups {', '.join(sorted({records[m].group for m in members}))}"
    assert str(refused.value).startswith(f"loss and grad_norm of update step 3 ({named}) are not finite;")
    assert checkpoints.latest() == 2
    state, _ = checkpoints.restore(fresh())
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(state.trainable)))
    assert [row["step"] for row in MetricsLog(tmp_path / "metrics.jsonl").rows()] == [1, 2]
    checkpoints.close()


@pytest.mark.parametrize("name", ["loss", "grad_norm", "param_norm"])
@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_each_number_that_is_not_finite_is_named(run, name, bad):
    class Bad(Stub):
        def __call__(self, state, batch):
            state, metrics = super().__call__(state, batch)
            return state, metrics | ({name: np.float32(bad)} if len(self.seen) == 2 else {})

    shelf = Shelf()
    with pytest.raises(Refusal, match=f"^{name} of update step 2 "):
        run(Bad(), counting(), 4, checkpoints=shelf, marks=Marks(save=1))
    assert [step for step, _, _ in shelf.saved] == [1]


@pytest.mark.parametrize("lse, said", [(9e-5, True), (2e-4, False), (12.0, False)])
def test_logits_that_seem_normalised_are_told_of_once(run, capsys, lse, said):
    class Normalised(Stub):
        def __call__(self, state, batch):
            state, metrics = super().__call__(state, batch)
            return state, metrics | {"lse_abs": np.float32(lse)}

    run(Normalised(), counting(), 3, checkpoints=Shelf())
    assert capsys.readouterr().err.count("as if they were normalised already") == said


def test_throughput_leaves_out_what_compiled():
    rows = [
        {"tokens": 100, "seconds": 50.0, "compiled": True},
        {"tokens": 30, "seconds": 0.5, "compiled": False},
        {"tokens": 10, "seconds": 1.5, "compiled": False},
    ]
    assert tokens_per_second(rows) == 20.0
    assert tokens_per_second(rows[:1]) is None and tokens_per_second([]) is None


def _shared_tokens(batches, members) -> int:
    """Distinct prefixes within each group: what a shared prompt leaves to compute."""
    records = [batches.records[member] for member in members]
    return len(
        {(record.group, tuple(record.tokens[: end + 1])) for record in records for end in range(len(record.tokens))}
    )


def _bits(state):
    return jax.device_get(state._replace(key=jax.random.key_data(state.key)))


def _timeless(row):
    return {name: value for name, value in row.items() if name not in TIMING}


def test_a_batch_is_made_while_the_one_before_it_is_used(batches, monkeypatch):
    """What takes the reader less time than an update takes the device costs nothing but the first time."""
    make = Batches.__call__

    def slow(self, step):
        time.sleep(0.05)
        return make(self, step)

    monkeypatch.setattr(Batches, "__call__", slow)
    waited = []
    for item in batches.ahead(0, 6):
        waited.append(item.waited)
        time.sleep(0.15)
    assert waited[0] >= 0.05 and max(waited[1:]) < 0.03
