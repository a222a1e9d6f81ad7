"""Checkpoints: every bit comes back, on any mesh; the right ones are kept; what does not fit is refused by name."""

import shutil
from types import SimpleNamespace

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
RULE = Optimizer("adamw", learning_rate=0.1).build(10)


def make_state(seed, mesh=None, *, shapes=SHAPES, rule=RULE, step=0, frozen=False):
    """A state whose every leaf holds random bits, moments included."""
    rng = np.random.default_rng(seed)

    def draw(shape, axes):
        leaf = rng.normal(size=shape).astype(np.float32)
        return jnp.array(leaf) if mesh is None else jax.device_put(leaf, named_sharding(mesh, axes, shape))

    params = {
        name: {inner: draw(shape, AXES[name][inner]) for inner, shape in part.items()} for name, part in shapes.items()
    }
    state = init_state(
        SimpleNamespace(mesh=mesh),
        params,
        rule,
        trainable=lambda path: not frozen or path[0] != "norm",
        targets=lambda params: {"slow": params["norm"]},
    )
    noise = lambda leaf: jax.device_put(rng.normal(size=leaf.shape).astype(leaf.dtype), leaf.sharding)
    moments = jax.tree.map(lambda leaf: noise(leaf) if leaf.ndim else leaf + step, state.opt_state)
    return state._replace(opt_state=moments, step=jax.device_put(jnp.int32(step), state.step.sharding))


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


@pytest.fixture
def open_checkpoints(tmp_path):
    """The checkpoints of one directory, as a process finds them that starts after the last one has ended."""
    opened = []

    def make(**options):
        for before in opened:
            before.close()
        opened.append(Checkpoints(tmp_path / "checkpoints", **options))
        return opened[-1]

    yield make
    for checkpoints in opened:
        checkpoints.close()


def kept(tmp_path):
    return sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir())


def test_every_bit_comes_back_with_the_metadata(open_checkpoints):
    state = make_state(1, step=7)
    open_checkpoints().save(state, {"stage": "update", "settings": {"seed": 3}})
    again, metadata = open_checkpoints().restore(make_state(2))
    same(again, state)
    assert int(again.step) == 7 and metadata == {"stage": "update", "settings": {"seed": 3}}


def test_what_is_saved_is_the_state_of_the_call_though_its_memory_is_given_away(open_checkpoints):
    checkpoints, state = open_checkpoints(), make_state(1, step=1)
    expected = jax.tree.map(jnp.copy, state)
    checkpoints.save(state, {})
    moved = jax.jit(lambda s: s._replace(trainable=jax.tree.map(lambda x: x * 0, s.trainable)), donate_argnums=0)(state)
    # While a save still reads from the memory it is not given away; how long that is depends on the machine's load.
    assert not moved.trainable["norm"]["scale"].any()
    same(checkpoints.restore(make_state(2))[0], expected)


@pytest.mark.parametrize(
    ("saved", "wanted"), [(None, "fsdp=2,tensor=2"), ("fsdp=8", "fsdp=2,tensor=2"), ("fsdp=8", None)]
)
def test_another_mesh_reads_the_same_bits_into_its_own_shardings(open_checkpoints, requested_mesh, saved, wanted):
    state, into = make_state(1, requested_mesh(saved), step=3), make_state(2, requested_mesh(wanted))
    open_checkpoints().save(state, {})
    again, _ = open_checkpoints().restore(into)
    same(again, state)
    for leaf, target in zip(jax.tree.leaves(again), jax.tree.leaves(into), strict=True):
        assert leaf.sharding.is_equivalent_to(target.sharding, leaf.ndim)
    if wanted:
        assert again.trainable["attention"]["kernel"].sharding.shard_shape((8, 4)) == (4, 2)


def test_a_named_step_is_read_rather_than_the_latest(open_checkpoints):
    checkpoints = open_checkpoints(keep=3)
    states = [make_state(seed, step=seed) for seed in (1, 2, 3)]
    for state in states:
        checkpoints.save(state, {"seed": int(state.step)})
    assert checkpoints.latest() == 3
    for state in states:
        again, metadata = checkpoints.restore(make_state(9), int(state.step))
        same(again, state)
        assert metadata == {"seed": int(state.step)} == checkpoints.metadata(int(state.step))


def test_the_latest_and_the_best_are_kept(open_checkpoints, tmp_path):
    checkpoints = open_checkpoints(keep=2, best="reward")
    for step, reward in enumerate([0.1, 0.9, 0.3, 0.2, 0.4]):
        checkpoints.save(make_state(step, step=step), {}, {"reward": np.float32(reward), "kl": 1.0})
    checkpoints.wait()
    assert kept(tmp_path) == [1, 3, 4]


def test_checkpoints_that_were_not_evaluated_do_not_pile_up(open_checkpoints, tmp_path):
    checkpoints = open_checkpoints(keep=2, best="reward")
    for step in range(7):
        checkpoints.save(make_state(step, step=step), {}, {"reward": -step} if step in (1, 3) else {})
    checkpoints.wait()
    assert kept(tmp_path) == [1, 5, 6]


def test_without_a_best_only_the_latest_are_kept(open_checkpoints, tmp_path):
    checkpoints = open_checkpoints(keep=1)
    for step in range(3):
        checkpoints.save(make_state(step, step=step), {}, {"reward": -step})
    checkpoints.wait()
    assert kept(tmp_path) == [2]


@pytest.mark.parametrize("wait", [False, True])
def test_a_step_that_is_saved_twice_stays_as_it_was(open_checkpoints, tmp_path, wait):
    checkpoints, state = open_checkpoints(), make_state(1, step=4)
    checkpoints.save(state, {"try": 1})
    if wait:
        checkpoints.wait()
    checkpoints.save(make_state(2, step=4), {"try": 2})
    again, metadata = checkpoints.restore(make_state(3))
    same(again, state)
    assert metadata == {"try": 1} and kept(tmp_path) == [4]


def test_a_save_that_was_killed_is_not_there_and_is_cleaned_away(open_checkpoints, tmp_path):
    first, state = open_checkpoints(), make_state(1, step=2)
    first.save(state, {})
    first.close()
    directory = tmp_path / "checkpoints"
    left = directory / "5.orbax-checkpoint-tmp"
    shutil.copytree(directory / "2", left)
    for file in [path for path in left.rglob("*") if path.is_file()][::2]:
        file.unlink()
    checkpoints = open_checkpoints()
    assert checkpoints.latest() == 2
    same(checkpoints.restore(make_state(3))[0], state)
    later = make_state(4, step=5)
    checkpoints.save(later, {})
    same(checkpoints.restore(make_state(3))[0], later)
    assert kept(tmp_path) == [2, 5]


def test_a_step_that_was_not_evaluated_is_saved_again_when_it_is(open_checkpoints, tmp_path):
    state, checkpoints = make_state(1, step=4), open_checkpoints(best="reward")
    checkpoints.save(state, {"when": "stopped"})
    assert checkpoints.metrics(4) is None
    checkpoints.save(state, {"when": "evaluated"}, {"reward": 0.5})
    checkpoints.save(state, {"when": "again"}, {"reward": 0.75})
    for later in (checkpoints, open_checkpoints(best="reward")):
        later.wait()
        assert later.metrics(4) == {"reward": 0.5} and later.metadata(4) == {"when": "evaluated"}
    same(later.restore(make_state(2))[0], state)
    assert kept(tmp_path) == [4]


def test_a_checkpoint_is_never_seen_with_a_part_of_its_files(open_checkpoints, tmp_path, monkeypatch):
    """Whoever is killed while an old one is deleted leaves it under a name that is none, and the next clears it away."""
    checkpoints, seen = open_checkpoints(keep=1), []

    def killed(path, *_, **__):
        seen.append((path.name, sorted(place.name for place in path.parent.iterdir() if place.name.isdigit())))
        raise KeyboardInterrupt

    for step in (1, 2):
        checkpoints.save(make_state(step, step=step), {})
        checkpoints._checkpointer.wait()
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            checkpoints.wait()
    assert seen == [("1.removed", ["2"])] and (tmp_path / "checkpoints" / "1.removed").is_dir()
    assert open_checkpoints(keep=1).latest() == 2 and kept(tmp_path) == [2]


def test_a_policy_is_read_without_the_optimisers_memory(open_checkpoints, tmp_path):
    state = make_state(1, step=2)
    first = open_checkpoints()
    first.save(state, {})
    first.wait()
    shutil.rmtree(tmp_path / "checkpoints" / "2" / "memory")
    params = open_checkpoints().restore_params(make_state(2).params())
    jax.tree.map(np.testing.assert_array_equal, params, state.params())


def test_a_policy_is_laid_over_what_did_not_learn(open_checkpoints):
    state, fresh = make_state(1, step=2, frozen=True), make_state(2)
    open_checkpoints().save(state, {})
    params = open_checkpoints().restore_params(fresh.params())
    np.testing.assert_array_equal(params["attention"]["kernel"], state.trainable["attention"]["kernel"])
    np.testing.assert_array_equal(params["norm"]["scale"], fresh.params()["norm"]["scale"])
    assert not np.array_equal(params["norm"]["scale"], state.frozen["norm"]["scale"])


def test_frozen_leaves_come_from_the_state_that_is_restored_into(open_checkpoints):
    state, into = make_state(1, step=2, frozen=True), make_state(2, frozen=True)
    open_checkpoints().save(state, {})
    again, _ = open_checkpoints().restore(into)
    same(again, state._replace(frozen=into.frozen))


def test_another_shape_is_refused_by_the_leafs_name(open_checkpoints):
    open_checkpoints().save(make_state(1, step=2), {})
    wider = {"attention": {"kernel": (8, 6)}, "norm": {"scale": (8,)}}
    with pytest.raises(
        UserError, match=r"trainable\.attention\.kernel is float32\[8, 4\], expected is float32\[8, 6\]"
    ):
        open_checkpoints().restore(make_state(2, shapes=wider))


def test_another_dtype_is_refused_rather_than_cast(open_checkpoints):
    open_checkpoints().save(make_state(1, step=2), {})
    into = make_state(2)
    into = into._replace(trainable=jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), into.trainable))
    with pytest.raises(UserError, match=r"is float32\[8, 4\], expected is bfloat16\[8, 4\]"):
        open_checkpoints().restore(into)


def test_a_missing_and_a_surplus_leaf_are_refused_by_name(open_checkpoints):
    open_checkpoints().save(make_state(1, step=2), {})
    with pytest.raises(UserError, match=r"checkpoint 2 in .*it has a trainable\.norm\.scale"):
        open_checkpoints().restore(make_state(2, frozen=True))
    with pytest.raises(UserError, match=r"it has a opt_state\.1\.0\.count"):
        open_checkpoints().restore(make_state(2, rule=optax.sgd(1.0)))


def test_nothing_to_restore_is_refused(open_checkpoints, tmp_path):
    checkpoints = open_checkpoints()
    assert checkpoints.latest() is None
    with pytest.raises(UserError, match="holds no complete checkpoint"):
        checkpoints.restore(make_state(1))
    checkpoints.save(make_state(1, step=2), {})
    with pytest.raises(UserError, match="holds no complete checkpoint 3"):
        checkpoints.restore_params(make_state(1).params(), 3)
