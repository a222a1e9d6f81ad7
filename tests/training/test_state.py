"""Training state: partition of the parameters, targets and shardings of the optimizer state."""

import chex
import jax
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shiq_jax.training.optimizers import Optimizer
from shiq_jax.training.state import init_state, merge, partition

TREES = st.recursive(
    st.dictionaries(st.text("ab", min_size=1, max_size=2), st.integers(), min_size=1, max_size=3),
    lambda inner: st.dictionaries(st.text("ab", min_size=1, max_size=2), inner | st.integers(), min_size=1, max_size=3),
    max_leaves=12,
)
IS_LEAF = {"is_leaf": lambda node: not isinstance(node, dict)}


def paths(tree) -> set:
    return {tuple(key.key for key in path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)}


@settings(deadline=None, max_examples=60)
@given(TREES, st.integers(0, 2**16))
def test_merge_inverts_partition(tree, salt):
    def keep(path):
        return hash((path, salt)) % 3 == 0

    kept, rest = partition(tree, keep)
    assert merge(kept, rest) == tree == merge(rest, kept)
    assert paths(kept) == {path for path in paths(tree) if keep(path)}
    assert paths(kept) | paths(rest) == paths(tree) and not paths(kept) & paths(rest)


@settings(deadline=None, max_examples=30)
@given(TREES)
def test_merge_prefers_the_overrides(tree):
    overrides = jax.tree.map(lambda leaf: leaf + 1, tree)
    assert merge(overrides, tree) == overrides


def test_all_parameters_are_trainable_by_default(model, model_on_mesh, host_params):
    _, params = model_on_mesh()
    state = init_state(model, params, optax.adam(1e-3))
    assert not state.frozen and not state.targets and int(state.step) == 0
    chex.assert_trees_all_equal(state.params(), host_params)


def test_frozen_parameters_have_no_optimizer_state(model, model_on_mesh):
    _, params = model_on_mesh()
    state = init_state(model, params, optax.adam(1e-3), trainable=lambda path: path[:2] == ("layers", "mlp"))
    assert set(state.trainable) == set(state.trainable["layers"]) - {"mlp"} | {"layers"}
    assert paths(state.trainable["layers"]) == {("mlp", name, "kernel") for name in ("gate", "up", "down")}
    assert paths(state.trainable) | paths(state.frozen) == paths(params)
    moments = optax.tree.get(state.opt_state, "mu")
    assert paths(moments) == paths(state.trainable)


def test_state_without_trainable_parameters_is_rejected(model, model_on_mesh):
    _, params = model_on_mesh()
    with pytest.raises(ValueError, match="nothing to train"):
        init_state(model, params, optax.sgd(1.0), trainable=lambda path: path[0] == "adapter")


def test_targets_survive_donation_of_the_parameters(model, model_on_mesh, host_params):
    _, params = model_on_mesh()
    state = init_state(model, params, optax.sgd(1.0), targets=lambda params: {"head": params["head"]})
    updated = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf + 1, tree), donate_argnums=0)(state.trainable)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.trainable))
    np.testing.assert_array_equal(state.targets["head"]["kernel"], host_params["head"]["kernel"])
    np.testing.assert_array_equal(updated["head"]["kernel"], host_params["head"]["kernel"] + 1)


@pytest.mark.parametrize("name", ["adamw", "lion", "sgd"])
def test_moments_are_sharded_like_their_parameters(model_on_mesh, name):
    model, params = model_on_mesh("fsdp=2,tensor=2")
    state = init_state(model, params, Optimizer(name).build(10))
    moments = [
        moment for key in ("mu", "nu", "trace") for _, moment in optax.tree.get_all_with_path(state.opt_state, key)
    ]
    assert moments
    for moment in moments:
        jax.tree.map(_assert_same_sharding, moment, params)
    assert not params["head"]["kernel"].sharding.is_fully_replicated
    counts = [count for _, count in optax.tree.get_all_with_path(state.opt_state, "count")]
    for scalar in (state.step, *counts):
        assert scalar.sharding.is_fully_replicated and len(scalar.sharding.device_set) == 4


def test_factored_moments_are_on_all_devices_of_the_mesh(model_on_mesh):
    model, params = model_on_mesh("fsdp=2,tensor=2")
    state = init_state(model, params, Optimizer("adafactor").build(10))
    expected = Optimizer("adafactor").build(10).init(jax.device_get(params))
    chex.assert_trees_all_equal(jax.device_get(state.opt_state), jax.device_get(expected))
    assert all(len(leaf.sharding.device_set) == 4 for leaf in jax.tree.leaves(state.opt_state))


@pytest.mark.parametrize("mesh", [None, "fsdp=2,tensor=2"])
@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_abstract_parameters_give_an_abstract_state(model_on_mesh, mesh, name):
    model, params = model_on_mesh(mesh)
    options = {"trainable": lambda path: path[0] != "norm", "targets": lambda params: {"head": params["head"]}}
    state = init_state(model, params, Optimizer(name).build(10), **options)
    abstract = init_state(model, model.abstract_params(), Optimizer(name).build(10), **options)
    assert jax.tree.structure(abstract) == jax.tree.structure(state)
    for leaf, struct in zip(jax.tree.leaves(state), jax.tree.leaves(abstract), strict=True):
        assert isinstance(struct, jax.ShapeDtypeStruct) and (struct.shape, struct.dtype) == (leaf.shape, leaf.dtype)
        assert mesh is None or struct.sharding.is_equivalent_to(leaf.sharding, leaf.ndim)


def _assert_same_sharding(leaf, param):
    assert leaf.shape == param.shape
    assert leaf.sharding.is_equivalent_to(param.sharding, param.ndim), (leaf.sharding, param.sharding)
