"""Checkpoints: bitwise restore on any mesh, retention, crash safety and errors."""

import shutil
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from shiq_jax.errors import UserError
from shiq_jax.sharding import named_sharding
from shiq_jax.training.checkpoints import Checkpoints
from shiq_jax.training.optimizers import Optimizer
from shiq_jax.training.state import init_state

AXES = {"attention": {"kernel": ("embed", "heads")}, "norm": {"scale": ("norm",)}}
SHAPES = {"attention": {"kernel": (8, 4)}, "norm": {"scale": (8,)}}
OPTIMIZER = Optimizer("adamw", learning_rate=0.1).build(10)


def make_state(seed, mesh=None, *, shapes=SHAPES, optimizer=OPTIMIZER, step=0, frozen=False):
    """A state with random values in every leaf, including the moments."""
    rng = np.random.default_rng(seed)

    def random_leaf(shape, axes):
        leaf = rng.normal(size=shape).astype(np.float32)
        return jnp.array(leaf) if mesh is None else jax.device_put(leaf, named_sharding(mesh, axes, shape))

    params = {
        module: {name: random_leaf(shape, AXES[module][name]) for name, shape in leaves.items()}
        for module, leaves in shapes.items()
    }
    state = init_state(
        SimpleNamespace(mesh=mesh),
        params,
        optimizer,
        trainable=lambda path: not frozen or path[0] != "norm",
        targets=lambda params: {"norm": params["norm"]},
    )
    noise = lambda leaf: jax.device_put(rng.normal(size=leaf.shape).astype(leaf.dtype), leaf.sharding)
    moments = jax.tree.map(lambda leaf: noise(leaf) if leaf.ndim else leaf + step, state.opt_state)
    return state._replace(opt_state=moments, step=jax.device_put(jnp.int32(step), state.step.sharding))


@pytest.fixture
def open_checkpoints(tmp_path):
    """Open the checkpoints of one directory like a new process, after closing those opened before."""
    opened = []

    def make(**options):
        for previous in opened:
            previous.close()
        opened.append(Checkpoints(tmp_path / "checkpoints", **options))
        return opened[-1]

    yield make
    for checkpoints in opened:
        checkpoints.close()


def saved_steps(tmp_path):
    return sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir())


def test_restore_is_bitwise_with_metadata(open_checkpoints):
    state = make_state(1, step=7)
    open_checkpoints().save(state, {"stage": "update", "settings": {"seed": 3}})
    restored, metadata = open_checkpoints().restore(make_state(2))
    chex.assert_trees_all_equal(restored, state)
    assert int(restored.step) == 7 and metadata == {"stage": "update", "settings": {"seed": 3}}


def test_save_copies_the_state_before_donation(open_checkpoints):
    checkpoints, state = open_checkpoints(), make_state(1, step=1)
    expected = jax.tree.map(jnp.copy, state)
    checkpoints.save(state, {})
    zeroed = jax.jit(lambda s: s._replace(trainable=jax.tree.map(lambda x: x * 0, s.trainable)), donate_argnums=0)(
        state
    )
    assert not zeroed.trainable["norm"]["scale"].any()
    chex.assert_trees_all_equal(checkpoints.restore(make_state(2))[0], expected)


@pytest.mark.parametrize(
    ("saved_mesh", "restored_mesh"), [(None, "fsdp=2,tensor=2"), ("fsdp=8", "fsdp=2,tensor=2"), ("fsdp=8", None)]
)
def test_restore_on_another_mesh(open_checkpoints, get_mesh, saved_mesh, restored_mesh):
    state, template = make_state(1, get_mesh(saved_mesh), step=3), make_state(2, get_mesh(restored_mesh))
    open_checkpoints().save(state, {})
    restored, _ = open_checkpoints().restore(template)
    chex.assert_trees_all_equal(restored, state)
    for leaf, expected in zip(jax.tree.leaves(restored), jax.tree.leaves(template), strict=True):
        assert leaf.sharding.is_equivalent_to(expected.sharding, leaf.ndim)
    if restored_mesh:
        assert restored.trainable["attention"]["kernel"].sharding.shard_shape((8, 4)) == (4, 2)


def test_restore_a_given_step(open_checkpoints):
    checkpoints = open_checkpoints(keep=3)
    states = [make_state(seed, step=seed) for seed in (1, 2, 3)]
    for state in states:
        checkpoints.save(state, {"seed": int(state.step)})
    assert checkpoints.latest() == 3
    for state in states:
        restored, metadata = checkpoints.restore(make_state(9), int(state.step))
        chex.assert_trees_all_equal(restored, state)
        assert metadata == {"seed": int(state.step)} == checkpoints.metadata(int(state.step))


def test_latest_and_best_are_kept(open_checkpoints, tmp_path):
    checkpoints = open_checkpoints(keep=2, best="reward")
    for step, reward in enumerate([0.1, 0.9, 0.3, 0.2, 0.4]):
        checkpoints.save(make_state(step, step=step), {}, {"reward": np.float32(reward), "kl": 1.0})
    checkpoints.wait()
    assert saved_steps(tmp_path) == [1, 3, 4]


def test_checkpoints_without_metrics_are_pruned(open_checkpoints, tmp_path):
    checkpoints = open_checkpoints(keep=2, best="reward")
    for step in range(7):
        checkpoints.save(make_state(step, step=step), {}, {"reward": -step} if step in (1, 3) else {})
    checkpoints.wait()
    assert saved_steps(tmp_path) == [1, 5, 6]


def test_only_latest_are_kept_by_default(open_checkpoints, tmp_path):
    checkpoints = open_checkpoints(keep=1)
    for step in range(3):
        checkpoints.save(make_state(step, step=step), {}, {"reward": -step})
    checkpoints.wait()
    assert saved_steps(tmp_path) == [2]


@pytest.mark.parametrize("wait", [False, True])
def test_saving_a_step_twice_keeps_the_first(open_checkpoints, tmp_path, wait):
    checkpoints, state = open_checkpoints(), make_state(1, step=4)
    checkpoints.save(state, {"attempt": 1})
    if wait:
        checkpoints.wait()
    checkpoints.save(make_state(2, step=4), {"attempt": 2})
    restored, metadata = checkpoints.restore(make_state(3))
    chex.assert_trees_all_equal(restored, state)
    assert metadata == {"attempt": 1} and saved_steps(tmp_path) == [4]


def test_incomplete_save_is_ignored_and_removed(open_checkpoints, tmp_path):
    first, state = open_checkpoints(), make_state(1, step=2)
    first.save(state, {})
    first.close()
    directory = tmp_path / "checkpoints"
    incomplete = directory / "5.orbax-checkpoint-tmp"
    shutil.copytree(directory / "2", incomplete)
    for file in [path for path in incomplete.rglob("*") if path.is_file()][::2]:
        file.unlink()
    checkpoints = open_checkpoints()
    assert checkpoints.latest() == 2
    chex.assert_trees_all_equal(checkpoints.restore(make_state(3))[0], state)
    later = make_state(4, step=5)
    checkpoints.save(later, {})
    chex.assert_trees_all_equal(checkpoints.restore(make_state(3))[0], later)
    assert saved_steps(tmp_path) == [2, 5]


def test_step_is_saved_again_when_it_gets_metrics(open_checkpoints, tmp_path):
    state, checkpoints = make_state(1, step=4), open_checkpoints(best="reward")
    checkpoints.save(state, {"event": "stopped"})
    assert checkpoints.metrics(4) is None
    checkpoints.save(state, {"event": "evaluated"}, {"reward": 0.5})
    checkpoints.save(state, {"event": "evaluated again"}, {"reward": 0.75})
    for reader in (checkpoints, open_checkpoints(best="reward")):
        reader.wait()
        assert reader.metrics(4) == {"reward": 0.5} and reader.metadata(4) == {"event": "evaluated"}
    chex.assert_trees_all_equal(reader.restore(make_state(2))[0], state)
    assert saved_steps(tmp_path) == [4]


def test_interrupted_deletion_leaves_no_partial_checkpoint(open_checkpoints, tmp_path, monkeypatch):
    """A checkpoint is renamed before deletion, and the next process removes what is left of it."""
    checkpoints, calls = open_checkpoints(keep=1), []

    def interrupted_rmtree(path, *_, **__):
        calls.append((path.name, sorted(entry.name for entry in path.parent.iterdir() if entry.name.isdigit())))
        raise KeyboardInterrupt

    for step in (1, 2):
        checkpoints.save(make_state(step, step=step), {})
        checkpoints._checkpointer.wait()
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", interrupted_rmtree)
        with pytest.raises(KeyboardInterrupt):
            checkpoints.wait()
    assert calls == [("1.removed", ["2"])] and (tmp_path / "checkpoints" / "1.removed").is_dir()
    assert open_checkpoints(keep=1).latest() == 2 and saved_steps(tmp_path) == [2]


def test_restore_params_does_not_read_optimizer_state(open_checkpoints, tmp_path):
    state = make_state(1, step=2)
    first = open_checkpoints()
    first.save(state, {})
    first.wait()
    shutil.rmtree(tmp_path / "checkpoints" / "2" / "memory")
    params = open_checkpoints().restore_params(make_state(2).params())
    chex.assert_trees_all_equal(params, state.params())


def test_restore_params_keeps_frozen_leaves(open_checkpoints):
    state, fresh = make_state(1, step=2, frozen=True), make_state(2)
    open_checkpoints().save(state, {})
    params = open_checkpoints().restore_params(fresh.params())
    np.testing.assert_array_equal(params["attention"]["kernel"], state.trainable["attention"]["kernel"])
    np.testing.assert_array_equal(params["norm"]["scale"], fresh.params()["norm"]["scale"])
    assert not np.array_equal(params["norm"]["scale"], state.frozen["norm"]["scale"])


def test_frozen_leaves_come_from_the_template(open_checkpoints):
    state, template = make_state(1, step=2, frozen=True), make_state(2, frozen=True)
    open_checkpoints().save(state, {})
    restored, _ = open_checkpoints().restore(template)
    chex.assert_trees_all_equal(restored, state._replace(frozen=template.frozen))


def test_shape_mismatch_is_rejected(open_checkpoints):
    open_checkpoints().save(make_state(1, step=2), {})
    wider_shapes = {"attention": {"kernel": (8, 6)}, "norm": {"scale": (8,)}}
    with pytest.raises(UserError, match=r"trainable\.attention\.kernel is float32\[8, 4\], expected float32\[8, 6\]"):
        open_checkpoints().restore(make_state(2, shapes=wider_shapes))


def test_dtype_mismatch_is_rejected(open_checkpoints):
    open_checkpoints().save(make_state(1, step=2), {})
    template = make_state(2)
    template = template._replace(trainable=jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), template.trainable))
    with pytest.raises(UserError, match=r"is float32\[8, 4\], expected bfloat16\[8, 4\]"):
        open_checkpoints().restore(template)


def test_missing_and_extra_leaves_are_rejected(open_checkpoints):
    open_checkpoints().save(make_state(1, step=2), {})
    with pytest.raises(UserError, match=r"checkpoint 2 in .*it has a trainable\.norm\.scale"):
        open_checkpoints().restore(make_state(2, frozen=True))
    with pytest.raises(UserError, match=r"it has a opt_state\.1\.0\.count"):
        open_checkpoints().restore(make_state(2, optimizer=optax.sgd(1.0)))


def test_missing_checkpoint_is_rejected(open_checkpoints, tmp_path):
    checkpoints = open_checkpoints()
    assert checkpoints.latest() is None
    with pytest.raises(UserError, match="holds no complete checkpoint"):
        checkpoints.restore(make_state(1))
    checkpoints.save(make_state(1, step=2), {})
    with pytest.raises(UserError, match="holds no complete checkpoint 3"):
        checkpoints.restore_params(make_state(1).params(), 3)
