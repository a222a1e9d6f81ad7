"""The training loop: data order, asynchronous metrics, callbacks, resuming and non-finite updates."""

import dataclasses
import itertools
import time

import chex
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

OPTIMIZER = Optimizer("adamw", learning_rate=1e-2, schedule="constant", warmup=0).build(20)


@pytest.fixture(scope="module")
def batches(records, tmp_path_factory):
    buffer = Buffer.create(tmp_path_factory.mktemp("replay") / "buffer")
    buffer.append(records)
    # Padding the rows to a multiple of four gives every batch the same shape.
    return Batches(buffer, "trajectory", 3, seed=5, microbatches=4)


@pytest.fixture(scope="module")
def update(model):
    """SFT with adamw."""
    return make_update(model, OBJECTIVES["sft"], OPTIMIZER)


@pytest.fixture
def new_state(model_on_mesh):
    def make():
        model, params = model_on_mesh()
        return init_state(model, params, OPTIMIZER)

    return make


class FakeUpdate:
    """An update that records its batches and only increments the step."""

    def __init__(self):
        self.batches = []

    def __call__(self, state, batch):
        self.batches.append(batch)
        metrics = {"loss": jnp.float32(len(self.batches)), "grad_norm": jnp.float32(1)}
        return state._replace(step=state.step + 1), metrics


class Recorder(Callback):
    """Records the calls of the hooks; needs the state after the steps `needs` and stops after `stop_after`."""

    def __init__(self, events, needs=(), stop_after=None):
        self.events, self.needs, self.stop_after = events, needs, stop_after

    def on_update(self, result):
        self.events.append(("update", result.step, float(result.metrics["loss"])))

    def needs_state(self, step):
        return step in self.needs

    def should_stop(self, step):
        return step == self.stop_after

    def on_state(self, step, state, last):
        assert int(state.step) == step
        self.events.append(("state", step, last))


def empty_state(step=0) -> State:
    return State({}, {}, {}, (), jnp.int32(step))


def step_batch(step) -> DeviceBatch:
    """A batch that is just the step."""
    return DeviceBatch(np.int32(step))


def test_batches_follow_the_schedule(batches):
    update = FakeUpdate()
    state = fit(empty_state(), update, batches, start=0, stop=7)
    schedule, groups = Schedule(len(batches.pack_groups), 3, seed=5), pack_groups(batches.records, "trajectory")
    assert len(update.batches) == 7 and int(state.step) == 7
    for step, batch in enumerate(update.batches):
        expected = [member for index in schedule.indices(step) for example in groups[index] for member in example]
        assert sorted(batches(step).members[batches(step).members >= 0]) == sorted(expected)
        chex.assert_trees_all_equal(batch, batches(step).batch)
        total_reward = sum(batches.records[member].rewards.sum() for member in expected)
        np.testing.assert_allclose(np.sum(batch.example.rewards), total_reward, atol=1e-4)
    epoch = [member for step in range(7) for member in batches(step).members.ravel() if member >= 0]
    assert set(epoch) == set(range(len(batches.records)))


def test_resumed_loop_uses_the_remaining_batches():
    update = FakeUpdate()
    fit(empty_state(4), update, step_batch, start=4, stop=7)
    assert update.batches == [4, 5, 6]


def test_loop_without_steps_does_nothing():
    update, events = FakeUpdate(), []
    state = fit(empty_state(7), update, step_batch, start=7, stop=7, callbacks=[Recorder(events)])
    assert not update.batches and not events and int(state.step) == 7


def test_metrics_are_fetched_while_the_next_update_runs():
    events, fake_update = [], FakeUpdate()

    def update(state, batch):
        events.append(("start", int(batch) + 1))
        return fake_update(state, batch)

    fit(empty_state(), update, step_batch, start=0, stop=4, callbacks=[Recorder(events, needs=(2,))])
    assert events == [
        ("start", 1), ("start", 2), ("update", 1, 1.0), ("update", 2, 2.0), ("state", 2, False),
        ("start", 3), ("start", 4), ("update", 3, 3.0), ("update", 4, 4.0), ("state", 4, True),
    ]  # fmt: skip


def test_callback_can_stop_the_loop():
    events, update = [], FakeUpdate()
    state = fit(empty_state(), update, step_batch, start=0, stop=9, callbacks=[Recorder(events, (3, 6), stop_after=6)])
    assert int(state.step) == 6 and len(update.batches) == 6
    assert [event for event in events if event[0] == "state"] == [("state", 3, False), ("state", 6, True)]


def test_error_in_on_update_precedes_on_state():
    class RaiseAtStepTwo(Callback):
        def on_update(self, result):
            if result.step == 2:
                raise UserError("step 2")

    events = []
    with pytest.raises(UserError):
        callbacks = [RaiseAtStepTwo(), Recorder(events, (1, 2, 3))]
        fit(empty_state(), FakeUpdate(), step_batch, start=0, stop=3, callbacks=callbacks)
    assert events == [("update", 1, 1.0), ("state", 1, False)]


def test_update_results_have_seconds_and_compiled():
    results = []

    class Collect(Callback):
        def on_update(self, result):
            results.append(result)

    def update(state, batch):
        time.sleep(0.05)
        return state, {"loss": np.float32(batch.sum())}

    fit(empty_state(), update, lambda step: DeviceBatch(np.ones(1 + step % 2)), start=0, stop=4, callbacks=[Collect()])
    assert [result.compiled for result in results] == [True, True, False, False]
    # The seconds of the updates add up to the time of the loop.
    assert 0.2 <= sum(result.seconds for result in results) < 2


def test_resume_is_bitwise(update, new_state, batches, tmp_path):
    uninterrupted = fit(new_state(), update, batches, start=0, stop=5)
    calls = itertools.count(1)

    class Interrupted(Exception):
        pass

    def interrupted_update(state, batch):
        if next(calls) == 4:
            raise Interrupted
        return update(state, batch)

    checkpoints = Checkpoints(tmp_path / "checkpoints")
    saving = SaveCheckpoints(checkpoints, every=2, metadata=lambda step: {"seed": 5})
    with pytest.raises(Interrupted):
        fit(new_state(), interrupted_update, batches, start=0, stop=5, callbacks=[saving])
    checkpoints.close()

    checkpoints = Checkpoints(tmp_path / "checkpoints")
    state, metadata = checkpoints.restore(new_state())
    assert int(state.step) == 2 and metadata == {"seed": 5}
    resumed = fit(state, update, batches, start=2, stop=5, callbacks=[SaveCheckpoints(checkpoints, every=2)])
    chex.assert_trees_all_equal(resumed, uninterrupted)
    assert checkpoints.latest() == 5
    chex.assert_trees_all_equal(checkpoints.restore(new_state())[0], uninterrupted)
    checkpoints.close()


def test_non_finite_loss_stops_before_the_checkpoint(model, new_state, records, make_buffer, tmp_path):
    """The square of one reward overflows, so that the loss of its batch is infinite."""
    huge = dataclasses.replace(records[3], rewards=np.full_like(records[3].rewards, 1e30))
    zeros = [(np.zeros_like(record.rewards),) * 2 for record in records]
    buffer = make_buffer([*records[:3], huge, *records[4:]])
    seed = next(
        seed
        for seed in range(100)
        if [3 in Batches(buffer, "trajectory", 3, seed=seed)(step).members for step in range(3)] == [False, False, True]
    )
    batches = Batches(buffer, "trajectory", 3, seed=seed, references={"reference": zeros}, microbatches=4)
    members = sorted(int(member) for member in batches(2).members.ravel() if member >= 0)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    shiq = make_update(model, OBJECTIVES["shiq"], OPTIMIZER)
    callbacks = [CheckFinite("update", batches.records), SaveCheckpoints(checkpoints, every=1)]
    with pytest.raises(UserError) as error:
        fit(new_state(), shiq, batches, start=0, stop=6, callbacks=callbacks)
    source = (
        f"records {', '.join(map(str, members))} of groups {', '.join(sorted({records[m].group for m in members}))}"
    )
    assert str(error.value).startswith(f"loss and grad_norm of update step 3 ({source}) are not finite;")
    assert checkpoints.latest() == 2
    state, _ = checkpoints.restore(new_state())
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(state.trainable)))
    checkpoints.close()


@pytest.mark.parametrize("name", ["loss", "grad_norm", "param_norm"])
@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_non_finite_metric_is_named(name, value):
    class NonFiniteUpdate(FakeUpdate):
        def __call__(self, state, batch):
            state, metrics = super().__call__(state, batch)
            return state, metrics | ({name: np.float32(value)} if len(self.batches) == 2 else {})

    events = []
    callbacks = [CheckFinite(), Recorder(events, range(9))]
    with pytest.raises(UserError, match=f"^{name} of update step 2 is not finite"):
        fit(empty_state(), NonFiniteUpdate(), step_batch, start=0, stop=4, callbacks=callbacks)
    assert [event[1] for event in events if event[0] == "state"] == [1]


def test_prefetch_overlaps_with_the_update():
    """Only the first batch is waited for if loading is faster than the update."""

    def slow_batch(step):
        time.sleep(0.05)
        return step_batch(step)

    waits = []
    for _, wait_seconds in prefetch(slow_batch, 0, 6):
        waits.append(wait_seconds)
        time.sleep(0.15)
    assert waits[0] >= 0.05 and max(waits[1:]) < 0.03
