"""Private updates in microbatches, which add up in one array of gradients, against those that run at once."""

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
    dataset_size=100, expected_batch=16, steps=5, noise_multiplier=0.0, delta=1e-5, largest_batch=16, clip=FlatClip(0.5),
    unit="pair",
)  # fmt: skip
OBJECTIVE = OBJECTIVES["dpo"].configure(beta=0.5)
RULE = optax.sgd(1.0)
LORA = Lora(rank=3, alpha=6.0)


@pytest.fixture(scope="module")
def released(decoder, batch_of):
    """What an update moves the parameters by: the gradient, for plain descent at rate 1; of one with query norms."""

    @functools.cache
    def run(method, microbatches, mesh=None, **options):
        model, params = decoder("query and key norms", **options)
        grid = None if mesh is None else make_mesh(mesh)
        model = dataclasses.replace(model, mesh=grid)
        given = jax.tree.map(jnp.array, params)
        if grid is not None:
            given = jax.device_put(params, jax.tree.map(lambda leaf: leaf.sharding, model.abstract_params()))
        trainable = {"trainable": is_adapter} if model.lora else {}
        state = init_state(model, given, RULE, **trainable)
        mechanism = MECHANISM
        if method == "group":
            mechanism = dataclasses.replace(MECHANISM, clip=Groupwise(FlatClip(0.5), count_groups(state.trainable)))
        update = make_update(model, OBJECTIVE, RULE, privacy=mechanism, microbatches=microbatches, method=method)
        batch = shard_batch(batch_of("pair", 8), grid)
        adding, calls = UnitLosses.adding_to, []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(UnitLosses, "adding_to", lambda *given: calls.append(given) or adding(*given))
            state, _ = update(state, batch, private_key=jax.random.key(5))
        assert bool(calls) == (microbatches > 1)
        return jax.tree.map(lambda old, new: np.asarray(old) - np.asarray(new), params, jax.device_get(state.params()))

    return run


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ghost", "group"])
def test_adapters_beside_a_frozen_base(method, released, relative):
    whole, parts = (released(method, count, lora=LORA) for count in (1, 4))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(without_adapters(parts)))
    assert all(np.any(leaf) for leaf in jax.tree.leaves(only_adapters(parts)))
    assert relative(parts, whole) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ghost", "group"])
@pytest.mark.parametrize("remat", ["dots", "full"])
def test_rematerialisation(method, remat, released, relative):
    parts = released(method, 4, remat=remat)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(parts))
    assert relative(parts, released(method, 1)) < 1e-4


@pytest.mark.slow
def test_bfloat16(full_compilation, released, relative):
    # Products of bfloat16 that are summed in float32 need the compiler's passes on a CPU.
    half = {"compute_dtype": jnp.dtype(jnp.bfloat16)}
    whole, parts = (released("ghost", count, **half) for count in (1, 4))
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(parts))
    assert relative(parts, whole) < 2e-2


@pytest.mark.parametrize("mesh", ["fsdp=2,tensor=2", "tensor=2"])
def test_devices(mesh, released, relative):
    """Group-wise clipping; for the other methods see the tests of the update."""
    assert relative(released("group", 4, mesh=mesh), released("group", 1)) < 1e-4
