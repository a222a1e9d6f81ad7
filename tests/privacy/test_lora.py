"""Private training of LoRA adapters: only adapter gradients are clipped and get noise, on any mesh."""

import dataclasses

import chex
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
OPTIMIZER = optax.sgd(1.0)


@pytest.fixture(scope="module")
def lora_decoder(decoder):
    """Make (model, frozen base, adapters) of a variant."""

    def make(variant, **options):
        model, params = decoder(variant, lora=LORA, **options)
        params = jax.tree.map(jnp.array, params)
        return model, without_adapters(params), only_adapters(params)

    return make


def per_unit_gradients(losses, params, batch):
    """Compute the gradient of each unit separately; returns them stacked."""
    gradient = jax.jit(jax.grad(lambda params, unit: losses(params, unit, None)[0]))
    units = [jax.tree.map(lambda leaf: leaf[i : i + 1], batch) for i in range(len(batch.tokens))]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *(jax.device_get(gradient(params, unit)) for unit in units))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["vmap", "scan", "ghost", "bk"])
@pytest.mark.parametrize("variant, unit", [("tied", "pair"), ("biases", "group"), ("untied", "trajectory")])
def test_methods_match_per_unit_gradients(method, variant, unit, lora_decoder, make_batch, unit_losses, relative_error):
    model, frozen, adapters = lora_decoder(variant)
    losses, batch = unit_losses(model, unit, frozen), make_batch(unit)
    grads = per_unit_gradients(losses, adapters, batch)
    expected_norms = np.sqrt(
        sum(np.sum(np.square(leaf), axis=tuple(range(1, leaf.ndim))) for leaf in jax.tree.leaves(grads))
    )
    clip = FlatClip(float(np.median(expected_norms)))
    total, norms, _ = clipped_sum(losses, adapters, batch, clip=clip, method=method)
    factors = np.minimum(1, clip.clip_norm / expected_norms)
    assert 0 < (factors < 1).sum() < len(norms)
    np.testing.assert_allclose(norms, expected_norms, rtol=1e-5)
    assert relative_error(total, jax.tree.map(lambda leaf: np.tensordot(factors, leaf, 1), grads)) < 1e-5


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_result_is_independent_of_remat(remat, lora_decoder, make_batch, unit_losses, relative_error):
    totals = []
    for options in ({}, {"remat": remat}):
        model, frozen, adapters = lora_decoder("tied", **options)
        losses = unit_losses(model, "pair", frozen)
        totals.append(clipped_sum(losses, adapters, make_batch("pair"), clip=FlatClip(0.5), method="ghost")[0])
    assert relative_error(*totals) < 1e-5


def test_groupwise_clips_each_adapter_factor_of_each_layer(lora_decoder, make_batch, unit_losses, relative_error):
    model, frozen, adapters = lora_decoder("tied")
    losses, batch = unit_losses(model, "pair", frozen), make_batch("pair")
    groups = count_groups(adapters)
    assert groups == 2 * 7 * model.config.num_layers
    total, _, _ = clipped_sum(losses, adapters, batch, clip=Groupwise(FlatClip(0.3), groups))
    limit = 0.3 / np.sqrt(groups)

    def clipped(leaf):
        norms = np.sqrt(np.sum(np.square(leaf), axis=tuple(range(2, leaf.ndim)), keepdims=True))
        return np.sum(leaf * np.minimum(1, limit / np.maximum(norms, 1e-12)), axis=0)

    grads = per_unit_gradients(losses, adapters, batch)
    assert relative_error(total, jax.tree.map(clipped, grads)) < 1e-5


def test_trainable_base_is_covered(lora_decoder, make_batch, unit_losses, relative_error):
    model, frozen, adapters = lora_decoder("tied")
    params = merge(adapters, frozen)
    losses, batch = unit_losses(model, "pair"), make_batch("pair")
    assert not coverage(losses, params, batch).uncovered
    ghost, vmap = (clipped_sum(losses, params, batch, clip=FlatClip(0.5), method=name)[0] for name in ("ghost", "vmap"))
    assert relative_error(ghost, vmap) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [None, "fsdp=8", "fsdp=2,tensor=2"])
def test_private_update_moves_only_adapters_on_any_mesh(mesh, decoder, make_batch, relative_error):
    mechanism = Mechanism(
        dataset_size=100, expected_batch=8, steps=5, noise_multiplier=1.0, delta=1e-5, largest_batch=8,
        clip=FlatClip(0.5), unit="pair",
    )  # fmt: skip
    objective, updates = OBJECTIVES["dpo"].configure(beta=0.5), []
    for mesh in (None, mesh and make_mesh(mesh)):
        model, params = decoder("tied", lora=LORA)
        model = dataclasses.replace(model, mesh=mesh)
        initial = jax.tree.map(jnp.array, params)
        if mesh is not None:
            initial = jax.device_put(params, jax.tree.map(lambda leaf: leaf.sharding, model.abstract_params()))
        state = init_state(model, initial, OPTIMIZER, trainable=is_adapter)
        update = make_update(model, objective, OPTIMIZER, privacy=mechanism)
        state, _ = update(state, shard_batch(make_batch("pair", 8), mesh), private_key=jax.random.key(5))
        after = jax.device_get(state.params())
        chex.assert_trees_all_equal(without_adapters(after), without_adapters(params))
        updates.append(jax.tree.map(lambda old, new: old - new, only_adapters(params), only_adapters(after)))
    assert relative_error(updates[1], updates[0]) < 1e-4
    noise = np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(updates[0])])
    assert noise.std() == pytest.approx(0.5 / 8, rel=0.2)
