"""The private update: released gradient, noise, divisor, and independence of mesh, microbatches and method."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from shiq_jax.models import DecoderConfig, Model, init_params
from shiq_jax.objectives import OBJECTIVES
from shiq_jax.privacy import FlatClip, Groupwise, Mechanism, clipped_sum, count_groups, privatize
from shiq_jax.replay import full_rows
from shiq_jax.sharding import make_mesh
from shiq_jax.training.placement import shard_batch
from shiq_jax.training.state import init_state
from shiq_jax.training.update import make_update

NOISELESS = Mechanism(
    dataset_size=100, expected_batch=16, steps=5, noise_multiplier=0.0, delta=1e-5, largest_batch=16,
    clip=FlatClip(0.5), unit="pair",
)  # fmt: skip
OBJECTIVE = OBJECTIVES["dpo"].configure(beta=0.5)
ROOT = jax.random.key(5)
OPTIMIZER = optax.sgd(1.0)


@pytest.fixture(scope="module")
def released_gradient(decoder, make_batch):
    """Run an update with SGD at learning rate 1; return the change of the parameters and the metrics."""

    @functools.cache
    def run(mechanism=NOISELESS, mesh=None, microbatches=1, method="ghost", masked=0):
        model, params = decoder("tied")
        batch = make_batch("pair", 8)
        batch = batch._replace(real=batch.real & (np.arange(len(batch.tokens)) >= masked)[:, None])
        mesh = None if mesh is None else make_mesh(mesh)
        model = dataclasses.replace(model, mesh=mesh)
        initial = jax.tree.map(jnp.array, params)
        if mesh is not None:
            initial = jax.device_put(params, jax.tree.map(lambda leaf: leaf.sharding, model.abstract_params()))
        update = make_update(model, OBJECTIVE, OPTIMIZER, privacy=mechanism, microbatches=microbatches, method=method)
        state = init_state(model, initial, OPTIMIZER)
        state, metrics = update(state, shard_batch(batch, mesh), private_key=ROOT)
        after = jax.device_get(state.params())
        gradient = jax.tree.map(lambda old, new: np.asarray(old) - np.asarray(new), params, after)
        return gradient, jax.device_get(metrics)

    return run


@pytest.fixture(scope="module")
def total_and_mask(decoder, make_batch, unit_losses):
    """Clipped sum by the reference method, and the mask of real units."""
    model, params = decoder("tied")
    batch = make_batch("pair", 8)
    mask = np.asarray(batch.real[:, 0])
    return clipped_sum(unit_losses(model, "pair"), params, batch, clip=NOISELESS.clip, mask=mask, method="vmap")[
        0
    ], mask


def test_gradient_is_clipped_sum_over_expected_batch(released_gradient, total_and_mask, relative_error):
    gradient, metrics = released_gradient()
    total, mask = total_and_mask
    assert mask.sum() == 6 and len(mask) == 8
    assert relative_error(gradient, jax.tree.map(lambda leaf: leaf / 16, total)) < 1e-4
    assert set(metrics) == {"grad_norm", "param_norm"}


@pytest.mark.parametrize("method", ["ghost", "bk", "scan"])
@pytest.mark.parametrize(
    "mesh",
    [
        pytest.param("fsdp=8", marks=pytest.mark.slow), pytest.param("replica=8", marks=pytest.mark.slow),
        "fsdp=2,tensor=2", pytest.param("replica=2,fsdp=2,tensor=2", marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_gradient_is_independent_of_mesh(mesh, method, released_gradient, relative_error):
    assert relative_error(released_gradient(mesh=mesh, method=method)[0], released_gradient()[0]) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [None, "fsdp=2,tensor=2"])
def test_groupwise_clipping_on_mesh(mesh, released_gradient, decoder, relative_error):
    clip = Groupwise(FlatClip(0.5), count_groups(decoder("tied")[1]))
    mechanism = dataclasses.replace(NOISELESS, clip=clip)
    gradient = released_gradient(mechanism, mesh=mesh, method="group")[0]
    assert relative_error(gradient, released_gradient(mechanism, method="auto")[0]) < 1e-4
    assert relative_error(gradient, released_gradient()[0]) > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [None, "fsdp=2,tensor=2"])
@pytest.mark.parametrize("method", ["ghost", "bk", "scan"])
def test_gradient_is_independent_of_microbatches(method, mesh, released_gradient, relative_error):
    assert relative_error(released_gradient(microbatches=4, mesh=mesh, method=method)[0], released_gradient()[0]) < 1e-4


@pytest.mark.slow
def test_microbatches_accumulate_in_place(full_compilation):
    """Methods ghost and group need hardly more memory than a non-private step; scan needs a second gradient buffer."""
    sizes = dict(hidden_size=128, intermediate_size=512, num_layers=6, num_heads=2, num_kv_heads=2)
    model = Model.from_config(DecoderConfig(vocab_size=64, tie_word_embeddings=True, **sizes), remat="full")
    batch = full_rows(np.random.default_rng(0).integers(64, size=(8, 8)))
    state = init_state(model, init_params(model, jax.random.key(0)), OPTIMIZER)
    gradient_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state.params()))
    grouped = dataclasses.replace(NOISELESS, clip=Groupwise(FlatClip(0.5), count_groups(state.params())))

    def temporary_bytes(mechanism=None, method="auto", *key):
        update = make_update(model, OBJECTIVES["sft"], OPTIMIZER, privacy=mechanism, microbatches=8, method=method)
        return update.lower(state, batch, *key).compile().memory_analysis().temp_size_in_bytes

    plain = temporary_bytes()
    for mechanism, method in ((NOISELESS, "ghost"), (grouped, "group")):
        assert (
            temporary_bytes(dataclasses.replace(mechanism, unit="trajectory"), method, ROOT)
            < plain + 0.3 * gradient_bytes
        ), method
    # The bound detects a second buffer.
    assert (
        temporary_bytes(dataclasses.replace(NOISELESS, unit="trajectory"), "scan", ROOT) > plain + 0.8 * gradient_bytes
    )


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [None, "fsdp=2,tensor=2"])
def test_noise_is_added_once_on_any_mesh(mesh, released_gradient):
    noisy_mechanism = dataclasses.replace(NOISELESS, noise_multiplier=1.5)
    noisy, noiseless = released_gradient(noisy_mechanism, mesh=mesh)[0], released_gradient(mesh=mesh)[0]
    noise = privatize(jax.tree.map(np.zeros_like, noiseless), noisy_mechanism, ROOT, 0)
    chex.assert_trees_all_close(jax.tree.map(np.subtract, noisy, noiseless), noise, rtol=1e-7, atol=2e-6)


def test_empty_batch_releases_noise_only(released_gradient):
    mechanism = dataclasses.replace(NOISELESS, noise_multiplier=1.5)
    gradient = released_gradient(mechanism, masked=8)[0]
    noise = privatize(jax.tree.map(np.zeros_like, gradient), mechanism, ROOT, 0)
    chex.assert_trees_all_close(gradient, noise, rtol=1e-7, atol=2e-6)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(released_gradient(masked=8)[0]))


def test_divisor_is_independent_of_sampled_batch_size(released_gradient, relative_error):
    full, partial = released_gradient()[0], released_gradient(masked=2)[0]
    half_divisor = dataclasses.replace(NOISELESS, expected_batch=8)
    doubled = jax.tree.map(lambda leaf: 2 * leaf, partial)
    assert relative_error(released_gradient(half_divisor, masked=2)[0], doubled) < 1e-4
    assert relative_error(full, partial) > 1e-2


def test_coupled_objectives_and_shared_rows_are_rejected(decoder, make_batch):
    model, params = decoder("tied")
    for name in ("aot", "kto"):
        with pytest.raises(ValueError, match="couples the examples of a batch"):
            make_update(model, OBJECTIVES[name], OPTIMIZER, privacy=NOISELESS)
    batch = jax.tree.map(lambda leaf: leaf, make_batch("pair", 8))
    shared_rows = batch._replace(
        gather=np.repeat(batch.gather, 2, axis=1), real=np.repeat(batch.real, 2, axis=1),
        example=jax.tree.map(lambda leaf: np.repeat(leaf, 2, axis=1), batch.example),
    )  # fmt: skip
    update = make_update(model, OBJECTIVE, OPTIMIZER, privacy=NOISELESS)
    state = init_state(model, jax.tree.map(jnp.array, params), OPTIMIZER)
    with pytest.raises(ValueError, match="rows have 2 slots, but a row of a private batch holds one pair"):
        update(state, shared_rows, private_key=ROOT)


def test_private_metrics_are_returned_on_request(decoder, make_batch):
    model, params = decoder("tied")
    update = make_update(model, OBJECTIVE, OPTIMIZER, privacy=NOISELESS, return_unit_metrics=True)
    state = init_state(model, jax.tree.map(jnp.array, params), OPTIMIZER)
    _, metrics = update(state, make_batch("pair", 8), private_key=ROOT)
    assert set(metrics) == {"grad_norm", "param_norm", "private/norm", "private/loss"}
    assert np.isfinite(metrics["private/norm"]).sum() == 6
