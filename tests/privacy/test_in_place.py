"""Private updates that accumulate microbatches in place, against updates of the whole batch."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from shiq_jax.models import Lora, is_adapter
from shiq_jax.models.lora import only_adapters, without_adapters
from shiq_jax.objectives import OBJECTIVES
from shiq_jax.privacy import FlatClip, Groupwise, Mechanism, count_groups
from shiq_jax.sharding import make_mesh
from shiq_jax.training.placement import shard_batch
from shiq_jax.training.private_gradient import UnitLosses
from shiq_jax.training.state import init_state
from shiq_jax.training.update import make_update

MECHANISM = Mechanism(
    dataset_size=100, expected_batch=16, steps=5, noise_multiplier=0.0, delta=1e-5, largest_batch=16,
    clip=FlatClip(0.5), unit="pair",
)  # fmt: skip
OBJECTIVE = OBJECTIVES["dpo"].configure(beta=0.5)
OPTIMIZER = optax.sgd(1.0)
LORA = Lora(rank=3, alpha=6.0)


@pytest.fixture(scope="module")
def released_gradient(decoder, make_batch):
    """Run an update with SGD at learning rate 1; return the change of the parameters, which is the gradient."""

    @functools.cache
    def run(method, microbatches, mesh=None, **options):
        model, params = decoder("query and key norms", **options)
        mesh = None if mesh is None else make_mesh(mesh)
        model = dataclasses.replace(model, mesh=mesh)
        initial = jax.tree.map(jnp.array, params)
        if mesh is not None:
            initial = jax.device_put(params, jax.tree.map(lambda leaf: leaf.sharding, model.abstract_params()))
        trainable = {"trainable": is_adapter} if model.lora else {}
        state = init_state(model, initial, OPTIMIZER, **trainable)
        mechanism = MECHANISM
        if method == "group":
            mechanism = dataclasses.replace(MECHANISM, clip=Groupwise(FlatClip(0.5), count_groups(state.trainable)))
        update = make_update(model, OBJECTIVE, OPTIMIZER, privacy=mechanism, microbatches=microbatches, method=method)
        batch = shard_batch(make_batch("pair", 8), mesh)
        adding_to, calls = UnitLosses.adding_to, []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(UnitLosses, "adding_to", lambda *args: calls.append(args) or adding_to(*args))
            state, _ = update(state, batch, private_key=jax.random.key(5))
        assert bool(calls) == (microbatches > 1)
        return jax.tree.map(lambda old, new: np.asarray(old) - np.asarray(new), params, jax.device_get(state.params()))

    return run


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ghost", "group"])
def test_adapters_with_frozen_base(method, released_gradient, relative_error):
    full_batch, accumulated = (released_gradient(method, count, lora=LORA) for count in (1, 4))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(without_adapters(accumulated)))
    assert all(np.any(leaf) for leaf in jax.tree.leaves(only_adapters(accumulated)))
    assert relative_error(accumulated, full_batch) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ghost", "group"])
@pytest.mark.parametrize("remat", ["dots", "full"])
def test_remat(method, remat, released_gradient, relative_error):
    accumulated = released_gradient(method, 4, remat=remat)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(accumulated))
    assert relative_error(accumulated, released_gradient(method, 1)) < 1e-4


@pytest.mark.slow
def test_bfloat16(full_compilation, released_gradient, relative_error):
    # On CPU, bfloat16 products with float32 accumulation need the optimization passes of XLA.
    options = {"compute_dtype": jnp.dtype(jnp.bfloat16)}
    full_batch, accumulated = (released_gradient("ghost", count, **options) for count in (1, 4))
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(accumulated))
    assert relative_error(accumulated, full_batch) < 2e-2


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["fsdp=2,tensor=2", "tensor=2"])
def test_groupwise_clipping_on_mesh(mesh, released_gradient, relative_error):
    assert relative_error(released_gradient("group", 4, mesh=mesh), released_gradient("group", 1)) < 1e-4
