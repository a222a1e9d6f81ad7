"""The state of a run: what learns and what rests, and where the optimiser's memory is born."""

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
def test_split_and_merge_are_inverse(tree, salt):
    def keep(path):
        return hash((path, salt)) % 3 == 0

    kept, rest = partition(tree, keep)
    assert merge(kept, rest) == tree == merge(rest, kept)
    assert paths(kept) == {path for path in paths(tree) if keep(path)}
    assert paths(kept) | paths(rest) == paths(tree) and not paths(kept) & paths(rest)


@settings(deadline=None, max_examples=30)
@given(TREES)
def test_the_upper_tree_wins_where_both_have_a_leaf(tree):
    above = jax.tree.map(lambda leaf: leaf + 1, tree)
    assert merge(above, tree) == above


def test_everything_learns_by_default_and_params_are_the_models(model, on_mesh, host_params):
    _, params = on_mesh()
    state = init_state(model, params, optax.adam(1e-3))
    assert not state.frozen and not state.targets and int(state.step) == 0
    jax.tree.map(np.testing.assert_array_equal, state.params(), host_params)


def test_what_does_not_learn_has_no_optimiser_memory(model, on_mesh):
    _, params = on_mesh()
    state = init_state(model, params, optax.adam(1e-3), trainable=lambda path: path[:2] == ("layers", "mlp"))
    assert set(state.trainable) == set(state.trainable["layers"]) - {"mlp"} | {"layers"}
    assert paths(state.trainable["layers"]) == {("mlp", name, "kernel") for name in ("gate", "up", "down")}
    assert paths(state.trainable) | paths(state.frozen) == paths(params)
    moments = optax.tree.get(state.opt_state, "mu")
    assert paths(moments) == paths(state.trainable)


def test_refusal_when_nothing_learns(model, on_mesh):
    _, params = on_mesh()
    with pytest.raises(ValueError, match="nothing would learn"):
        init_state(model, params, optax.sgd(1.0), trainable=lambda path: path[0] == "adapter")


def test_targets_are_copies_that_survive_the_donation_of_their_source(model, on_mesh, host_params):
    _, params = on_mesh()
    state = init_state(model, params, optax.sgd(1.0), targets=lambda params: {"head": params["head"]})
    moved = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf + 1, tree), donate_argnums=0)(state.trainable)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.trainable))
    np.testing.assert_array_equal(state.targets["head"]["kernel"], host_params["head"]["kernel"])
    np.testing.assert_array_equal(moved["head"]["kernel"], host_params["head"]["kernel"] + 1)


@pytest.mark.parametrize("name", ["adamw", "lion", "sgd"])
def test_moments_are_born_in_the_shardings_of_their_parameters(on_mesh, name):
    model, params = on_mesh("fsdp=2,tensor=2")
    state = init_state(model, params, Optimizer(name).build(10))
    moments = [
        moment for key in ("mu", "nu", "trace") for _, moment in optax.tree.get_all_with_path(state.opt_state, key)
    ]
    assert moments
    for moment in moments:
        jax.tree.map(lambda leaf, param: _same_place(leaf, param), moment, params)
    assert not params["head"]["kernel"].sharding.is_fully_replicated
    for scalar in (state.step, *optax.tree.get_all_with_path(state.opt_state, "count")):
        scalar = scalar[1] if isinstance(scalar, tuple) else scalar
        assert scalar.sharding.is_fully_replicated and len(scalar.sharding.device_set) == 4


def test_factored_moments_on_a_mesh_lie_on_all_its_devices(on_mesh):
    model, params = on_mesh("fsdp=2,tensor=2")
    state = init_state(model, params, Optimizer("adafactor").build(10))
    reference = Optimizer("adafactor").build(10).init(jax.device_get(params))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.opt_state), jax.device_get(reference))
    assert all(len(leaf.sharding.device_set) == 4 for leaf in jax.tree.leaves(state.opt_state))


@pytest.mark.parametrize("mesh", [None, "fsdp=2,tensor=2"])
@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_abstract_parameters_give_the_abstract_state(on_mesh, mesh, name):
    model, params = on_mesh(mesh)
    options = {"trainable": lambda path: path[0] != "norm", "targets": lambda params: {"head": params["head"]}}
    state = init_state(model, params, Optimizer(name).build(10), **options)
    abstract = init_state(model, model.abstract_params(), Optimizer(name).build(10), **options)
    assert jax.tree.structure(abstract) == jax.tree.structure(state)
    for leaf, found in zip(jax.tree.leaves(state), jax.tree.leaves(abstract), strict=True):
        assert isinstance(found, jax.ShapeDtypeStruct) and (found.shape, found.dtype) == (leaf.shape, leaf.dtype)
        assert mesh is None or found.sharding.is_equivalent_to(leaf.sharding, leaf.ndim)


def _same_place(leaf, param):
    assert leaf.shape == param.shape
    assert leaf.sharding.is_equivalent_to(param.sharding, param.ndim), (leaf.sharding, param.sharding)
