"""The loop around an update step: order of the data, metrics one step late, callbacks, and numbers gone bad."""

import dataclasses
import itertools
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shiq_jax.errors import UserError
from shiq_jax.objectives import OBJECTIVES
from shiq_jax.replay import Buffer, Schedule, pack_groups
from shiq_jax.training.batches import Batches, DeviceBatch, prefetch
from shiq_jax.training.callbacks import CheckFinite, SaveCheckpoints
from shiq_jax.training.checkpoints import Checkpoints
from shiq_jax.training.fit import Callback, fit
from shiq_jax.training.optimizers import Optimizer
from shiq_jax.training.state import State, init_state
from shiq_jax.training.update import make_update

RULE = Optimizer("adamw", learning_rate=1e-2, schedule="constant", warmup=0).build(20)


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
        return init_state(model, params, RULE)

    return make


class Counting:
    """An update that only counts, and remembers its batches."""

    def __init__(self):
        self.seen = []

    def __call__(self, state, batch):
        self.seen.append(batch)
        metrics = {"loss": jnp.float32(len(self.seen)), "grad_norm": jnp.float32(1)}
        return state._replace(step=state.step + 1), metrics


class Recorder(Callback):
    """Notes what happens; needs the state after some updates, and ends the loop after one."""

    def __init__(self, events, needs=(), end=None):
        self.events, self.needs, self.end = events, needs, end

    def on_update(self, done):
        self.events.append(("update", done.step, float(done.metrics["loss"])))

    def needs_state(self, step):
        return step in self.needs

    def ends(self, step):
        return step == self.end

    def on_state(self, step, state, last):
        assert int(state.step) == step
        self.events.append(("state", step, last))


def counted(step=0) -> State:
    return State({}, {}, {}, (), jnp.int32(step))


def numbered(step) -> DeviceBatch:
    return DeviceBatch(np.int32(step))


def test_the_data_come_in_the_order_of_the_schedule(batches):
    stub = Counting()
    state = fit(counted(), stub, batches, start=0, stop=7)
    schedule, drawn = Schedule(len(batches.pack_groups), 3, seed=5), pack_groups(batches.records, "trajectory")
    assert len(stub.seen) == 7 and int(state.step) == 7
    for step, batch in enumerate(stub.seen):
        wanted = [member for number in schedule.indices(step) for example in drawn[number] for member in example]
        assert sorted(batches(step).members[batches(step).members >= 0]) == sorted(wanted)
        jax.tree.map(np.testing.assert_array_equal, batch, batches(step).batch)
        np.testing.assert_allclose(
            np.sum(batch.example.rewards), sum(batches.records[member].rewards.sum() for member in wanted), atol=1e-4
        )
    one_pass = [member for step in range(7) for member in batches(step).members.ravel() if member >= 0]
    assert set(one_pass) == set(range(len(batches.records)))


def test_a_loop_that_resumes_sees_the_batches_that_are_left():
    stub = Counting()
    fit(counted(4), stub, numbered, start=4, stop=7)
    assert stub.seen == [4, 5, 6]


def test_a_loop_that_is_over_does_nothing():
    stub, events = Counting(), []
    state = fit(counted(7), stub, numbered, start=7, stop=7, callbacks=[Recorder(events)])
    assert not stub.seen and not events and int(state.step) == 7


def test_metrics_are_fetched_while_the_next_update_runs():
    events, stub = [], Counting()

    def update(state, batch):
        events.append(("start", int(batch) + 1))
        return stub(state, batch)

    fit(counted(), update, numbered, start=0, stop=4, callbacks=[Recorder(events, needs=(2,))])
    assert events == [
        ("start", 1), ("start", 2), ("update", 1, 1.0), ("update", 2, 2.0), ("state", 2, False),
        ("start", 3), ("start", 4), ("update", 3, 3.0), ("update", 4, 4.0), ("state", 4, True),
    ]  # fmt: skip


def test_a_callback_may_end_the_loop():
    events, stub = [], Counting()
    state = fit(counted(), stub, numbered, start=0, stop=9, callbacks=[Recorder(events, (3, 6), end=6)])
    assert int(state.step) == 6 and len(stub.seen) == 6
    assert [event for event in events if event[0] == "state"] == [("state", 3, False), ("state", 6, True)]


def test_no_callback_sees_a_state_whose_metrics_another_refuses():
    class Refusing(Callback):
        def on_update(self, done):
            if done.step == 2:
                raise UserError("no")

    events = []
    with pytest.raises(UserError):
        fit(counted(), Counting(), numbered, start=0, stop=3, callbacks=[Refusing(), Recorder(events, (1, 2, 3))])
    assert events == [("update", 1, 1.0), ("state", 1, False)]


def test_seconds_and_shapes_of_updates():
    found = []

    class Times(Callback):
        def on_update(self, done):
            found.append(done)

    def update(state, batch):
        time.sleep(0.05)
        return state, {"loss": np.float32(batch.sum())}

    fit(counted(), update, lambda step: DeviceBatch(np.ones(1 + step % 2)), start=0, stop=4, callbacks=[Times()])
    assert [done.compiled for done in found] == [True, True, False, False]
    # The time of the whole loop, each part of it counted once.
    assert 0.2 <= sum(done.seconds for done in found) < 2


def test_a_stopped_loop_ends_in_the_same_bits(update, fresh, batches, tmp_path):
    whole = fit(fresh(), update, batches, start=0, stop=5)
    calls = itertools.count(1)

    class Stopped(Exception):
        pass

    def dies_at_its_fourth(state, batch):
        if next(calls) == 4:
            raise Stopped
        return update(state, batch)

    checkpoints = Checkpoints(tmp_path / "checkpoints")
    saving = SaveCheckpoints(checkpoints, every=2, metadata=lambda step: {"seed": 5})
    with pytest.raises(Stopped):
        fit(fresh(), dies_at_its_fourth, batches, start=0, stop=5, callbacks=[saving])
    checkpoints.close()

    checkpoints = Checkpoints(tmp_path / "checkpoints")
    state, metadata = checkpoints.restore(fresh())
    assert int(state.step) == 2 and metadata == {"seed": 5}
    again = fit(state, update, batches, start=2, stop=5, callbacks=[SaveCheckpoints(checkpoints, every=2)])
    jax.tree.map(np.testing.assert_array_equal, _bits(again), _bits(whole))
    assert checkpoints.latest() == 5
    jax.tree.map(np.testing.assert_array_equal, _bits(checkpoints.restore(fresh())[0]), _bits(whole))
    checkpoints.close()


def test_a_loss_that_is_not_finite_is_refused_and_the_checkpoint_before_it_stays(
    model, fresh, records, make_buffer, tmp_path
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
    callbacks = [CheckFinite("update", batches.records), SaveCheckpoints(checkpoints, every=1)]
    with pytest.raises(UserError) as refused:
        fit(fresh(), shiq, batches, start=0, stop=6, callbacks=callbacks)
    named = f"records {', '.join(map(str, members))} of groups {', '.join(sorted({records[m].group for m in members}))}"
    assert str(refused.value).startswith(f"loss and grad_norm of update step 3 ({named}) are not finite;")
    assert checkpoints.latest() == 2
    state, _ = checkpoints.restore(fresh())
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(state.trainable)))
    checkpoints.close()


@pytest.mark.parametrize("name", ["loss", "grad_norm", "param_norm"])
@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_each_number_that_is_not_finite_is_named(name, bad):
    class Bad(Counting):
        def __call__(self, state, batch):
            state, metrics = super().__call__(state, batch)
            return state, metrics | ({name: np.float32(bad)} if len(self.seen) == 2 else {})

    events = []
    callbacks = [CheckFinite(), Recorder(events, range(9))]
    with pytest.raises(UserError, match=f"^{name} of update step 2 is not finite"):
        fit(counted(), Bad(), numbered, start=0, stop=4, callbacks=callbacks)
    assert [event[1] for event in events if event[0] == "state"] == [1]


def test_a_batch_is_made_while_the_one_before_it_is_used():
    """What takes the reader less time than an update takes the device costs nothing but the first time."""

    def slow(step):
        time.sleep(0.05)
        return numbered(step)

    waits = []
    for _, waited in prefetch(slow, 0, 6):
        waits.append(waited)
        time.sleep(0.15)
    assert waits[0] >= 0.05 and max(waits[1:]) < 0.03


def _bits(state):
    return jax.device_get(state)
