"""Adapters that learn privately: only they are clipped and get noise, on one device as on several."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from shiq_jax.models import Lora, is_adapter
from shiq_jax.models.lora import only_adapters, without_adapters
from shiq_jax.objectives import OBJECTIVES
from shiq_jax.privacy import FlatClip, Groupwise, Mechanism, clipped_sum, count_groups
from shiq_jax.privacy.coverage import coverage
from shiq_jax.sharding import make_mesh
from shiq_jax.training.placement import shard_batch
from shiq_jax.training.state import init_state, merge
from shiq_jax.training.update import make_update

LORA = Lora(rank=3, alpha=6.0)
RULE = optax.sgd(1.0)


@pytest.fixture(scope="module")
def made(decoder):
    """(model, what stays, what learns) for a variant of the decoder."""

    def make(variant, **options):
        model, params = decoder(variant, lora=LORA, **options)
        params = jax.tree.map(jnp.array, params)
        return model, without_adapters(params), only_adapters(params)

    return make


def one_by_one(losses, params, batch):
    """The gradient of every unit, by itself, stacked."""
    gradient = jax.jit(jax.grad(lambda params, unit: losses(params, unit, None)[0]))
    units = [jax.tree.map(lambda leaf: leaf[i : i + 1], batch) for i in range(len(batch.tokens))]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *(jax.device_get(gradient(params, unit)) for unit in units))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["vmap", "scan", "ghost", "bk"])
@pytest.mark.parametrize("variant, unit", [("tied", "pair"), ("biases", "group"), ("untied", "trajectory")])
def test_all_methods_give_the_sum_of_clipped_gradients(method, variant, unit, made, batch_of, example_losses, relative):
    model, frozen, learned = made(variant)
    losses, batch = example_losses(model, unit, frozen), batch_of(unit)
    grads = one_by_one(losses, learned, batch)
    norms = np.sqrt(sum(np.sum(np.square(leaf), axis=tuple(range(1, leaf.ndim))) for leaf in jax.tree.leaves(grads)))
    clip = FlatClip(float(np.median(norms)))
    total, found, _ = clipped_sum(losses, learned, batch, clip=clip, method=method)
    factors = np.minimum(1, clip.clip_norm / norms)
    assert 0 < (factors < 1).sum() < len(norms)
    np.testing.assert_allclose(found, norms, rtol=1e-5)
    assert relative(total, jax.tree.map(lambda leaf: np.tensordot(factors, leaf, 1), grads)) < 1e-5


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_rematerialisation_changes_nothing(remat, made, batch_of, example_losses, relative):
    totals = []
    for options in ({}, {"remat": remat}):
        model, frozen, learned = made("tied", **options)
        losses = example_losses(model, "pair", frozen)
        totals.append(clipped_sum(losses, learned, batch_of("pair"), clip=FlatClip(0.5), method="ghost")[0])
    assert relative(*totals) < 1e-5


def test_each_factor_of_each_layer_is_a_group(made, batch_of, example_losses, relative):
    model, frozen, learned = made("tied")
    losses, batch = example_losses(model, "pair", frozen), batch_of("pair")
    groups = count_groups(learned)
    assert groups == 2 * 7 * model.config.num_layers
    total, _, _ = clipped_sum(losses, learned, batch, clip=Groupwise(FlatClip(0.3), groups))
    limit = 0.3 / np.sqrt(groups)

    def clipped(leaf):
        norms = np.sqrt(np.sum(np.square(leaf), axis=tuple(range(2, leaf.ndim)), keepdims=True))
        return np.sum(leaf * np.minimum(1, limit / np.maximum(norms, 1e-12)), axis=0)

    grads = one_by_one(losses, learned, batch)
    assert relative(total, jax.tree.map(clipped, grads)) < 1e-5


def test_a_base_that_learns_as_well_is_counted_with_them(made, batch_of, example_losses, relative):
    model, frozen, learned = made("tied")
    whole = merge(learned, frozen)
    losses, batch = example_losses(model, "pair"), batch_of("pair")
    assert not coverage(losses, whole, batch).missed
    ghost, vmap = (clipped_sum(losses, whole, batch, clip=FlatClip(0.5), method=name)[0] for name in ("ghost", "vmap"))
    assert relative(ghost, vmap) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [None, "fsdp=8", "fsdp=2,tensor=2"])
def test_the_private_update_moves_adapters_alone_and_the_same_on_every_mesh(mesh, decoder, batch_of, relative):
    mechanism = Mechanism(
        dataset_size=100, expected_batch=8, steps=5, noise_multiplier=1.0, delta=1e-5, largest_batch=8, clip=FlatClip(0.5),
        unit="pair",
    )  # fmt: skip
    objective, moved = OBJECTIVES["dpo"].configure(beta=0.5), []
    for grid in (None, mesh and make_mesh(mesh)):
        model, params = decoder("tied", lora=LORA)
        model = dataclasses.replace(model, mesh=grid)
        given = jax.tree.map(jnp.array, params)
        if grid is not None:
            given = jax.device_put(params, jax.tree.map(lambda leaf: leaf.sharding, model.abstract_params()))
        state = init_state(model, given, RULE, trainable=is_adapter)
        update = make_update(model, objective, RULE, privacy=mechanism)
        state, _ = update(state, shard_batch(batch_of("pair", 8), grid), private_key=jax.random.key(5))
        after = jax.device_get(state.params())
        kept = jax.tree.map(np.array_equal, without_adapters(after), without_adapters(params))
        assert all(jax.tree.leaves(kept))
        moved.append(jax.tree.map(lambda old, new: old - new, only_adapters(params), only_adapters(after)))
    assert relative(moved[1], moved[0]) < 1e-4
    noise = np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(moved[0])])
    assert noise.std() == pytest.approx(0.5 / 8, rel=0.2)
