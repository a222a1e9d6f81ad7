"""The private update: what it releases, and that neither devices nor microbatches nor absent units change it."""

import dataclasses
import functools

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

SILENT = Mechanism(
    dataset_size=100, expected_batch=16, steps=5, noise_multiplier=0.0, delta=1e-5, largest_batch=16, clip=FlatClip(0.5),
    unit="pair",
)  # fmt: skip
OBJECTIVE = OBJECTIVES["dpo"].configure(beta=0.5)
ROOT = jax.random.key(5)
RULE = optax.sgd(1.0)


@pytest.fixture(scope="module")
def released(decoder, batch_of):
    """The gradient that an update takes: plain descent at rate 1 moves the parameters by it."""

    @functools.cache
    def run(mechanism=SILENT, mesh=None, microbatches=1, method="ghost", absent=0):
        model, params = decoder("tied")
        batch = batch_of("pair", 8)
        batch = batch._replace(real=batch.real & (np.arange(len(batch.tokens)) >= absent)[:, None])
        grid = None if mesh is None else make_mesh(mesh)
        model = dataclasses.replace(model, mesh=grid)
        given = jax.tree.map(jnp.array, params)
        if grid is not None:
            given = jax.device_put(params, jax.tree.map(lambda leaf: leaf.sharding, model.abstract_params()))
        update = make_update(model, OBJECTIVE, RULE, privacy=mechanism, microbatches=microbatches, method=method)
        state = init_state(model, given, RULE)
        state, metrics = update(state, shard_batch(batch, grid), private_key=ROOT)
        moved = jax.tree.map(lambda old, new: np.asarray(old) - np.asarray(new), params, jax.device_get(state.params()))
        return moved, jax.device_get(metrics)

    return run


@pytest.fixture(scope="module")
def total(decoder, batch_of, example_losses):
    model, params = decoder("tied")
    batch = batch_of("pair", 8)
    mask = np.asarray(batch.real[:, 0])
    return clipped_sum(example_losses(model, "pair"), params, batch, clip=SILENT.clip, mask=mask, method="vmap")[
        0
    ], mask


def test_it_is_the_sum_of_clipped_gradients_over_the_expected_batch(released, total, relative):
    found, metrics = released()
    wanted, mask = total
    assert mask.sum() == 6 and len(mask) == 8
    assert relative(found, jax.tree.map(lambda leaf: leaf / 16, wanted)) < 1e-4
    assert set(metrics) == {"grad_norm", "param_norm"}


@pytest.mark.parametrize("method", ["ghost", "bk", "scan"])
@pytest.mark.parametrize(
    "mesh",
    [
        pytest.param("fsdp=8", marks=pytest.mark.slow), pytest.param("replica=8", marks=pytest.mark.slow),
        "fsdp=2,tensor=2", pytest.param("replica=2,fsdp=2,tensor=2", marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_devices_change_nothing(mesh, method, released, relative):
    assert relative(released(mesh=mesh, method=method)[0], released()[0]) < 1e-4


@pytest.mark.parametrize("mesh", [None, "fsdp=2,tensor=2"])
def test_groupwise_clipping_on_devices(mesh, released, decoder, relative):
    clip = Groupwise(FlatClip(0.5), count_groups(decoder("tied")[1]))
    mechanism = dataclasses.replace(SILENT, clip=clip)
    found = released(mechanism, mesh=mesh, method="group")[0]
    assert relative(found, released(mechanism, method="auto")[0]) < 1e-4
    assert relative(found, released()[0]) > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [None, "fsdp=2,tensor=2"])
@pytest.mark.parametrize("method", ["ghost", "bk", "scan"])
def test_microbatches_change_nothing(method, mesh, released, relative):
    assert relative(released(microbatches=4, mesh=mesh, method=method)[0], released()[0]) < 1e-4


@pytest.mark.slow
def test_microbatches_add_up_in_one_array_of_gradients(full_compilation):
    """Beside a plain step's, which adds up in place too, the two methods that sum rows at once hold next to nothing."""
    sizes = dict(hidden_size=128, intermediate_size=512, num_layers=6, num_heads=2, num_kv_heads=2)
    model = Model.from_config(DecoderConfig(vocab_size=64, tie_word_embeddings=True, **sizes), remat="full")
    batch = full_rows(np.random.default_rng(0).integers(64, size=(8, 8)))
    state = init_state(model, init_params(model, jax.random.key(0)), RULE)
    array = sum(leaf.nbytes for leaf in jax.tree.leaves(state.params()))
    grouped = dataclasses.replace(SILENT, clip=Groupwise(FlatClip(0.5), count_groups(state.params())))

    def beside(mechanism=None, method="auto", *key):
        update = make_update(model, OBJECTIVES["sft"], RULE, privacy=mechanism, microbatches=8, method=method)
        return update.lower(state, batch, *key).compile().memory_analysis().temp_size_in_bytes

    plain = beside()
    for mechanism, method in ((SILENT, "ghost"), (grouped, "group")):
        assert beside(dataclasses.replace(mechanism, unit="trajectory"), method, ROOT) < plain + 0.3 * array, method
    # That the bound would catch a second array: here there is one.
    assert beside(dataclasses.replace(SILENT, unit="trajectory"), "scan", ROOT) > plain + 0.8 * array


@pytest.mark.parametrize("mesh", [None, "fsdp=2,tensor=2"])
def test_the_noise_is_that_of_the_mechanism_on_every_mesh(mesh, released):
    """It is added once: the same numbers whatever the devices, and those of the key and the step."""
    loud = dataclasses.replace(SILENT, noise_multiplier=1.5)
    noisy, silent = released(loud, mesh=mesh)[0], released(mesh=mesh)[0]
    nothing = jax.tree.map(np.zeros_like, silent)
    noise = privatize(nothing, loud, ROOT, 0)
    jax.tree.map(lambda a, b, c: np.testing.assert_allclose(a - b, c, atol=2e-6), noisy, silent, noise)


def test_a_batch_without_units_still_steps_with_noise_alone(released):
    loud = dataclasses.replace(SILENT, noise_multiplier=1.5)
    found = released(loud, absent=8)[0]
    noise = privatize(jax.tree.map(np.zeros_like, found), loud, ROOT, 0)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), found, noise)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(released(absent=8)[0]))


def test_the_divisor_does_not_know_how_many_there_are(released, relative):
    """Absent units take their own part away and leave that of the others."""
    all_of_them, some = released()[0], released(absent=2)[0]
    double = dataclasses.replace(SILENT, expected_batch=8)
    assert relative(released(double, absent=2)[0], jax.tree.map(lambda leaf: 2 * leaf, some)) < 1e-4
    assert relative(all_of_them, some) > 1e-2


def test_coupled_objectives_and_shared_rows_are_refused(decoder, batch_of):
    model, params = decoder("tied")
    for name in ("aot", "kto"):
        with pytest.raises(ValueError, match="couples the examples of a batch"):
            make_update(model, OBJECTIVES[name], RULE, privacy=SILENT)
    batch = jax.tree.map(lambda leaf: leaf, batch_of("pair", 8))
    double = batch._replace(
        gather=np.repeat(batch.gather, 2, axis=1), real=np.repeat(batch.real, 2, axis=1),
        example=jax.tree.map(lambda leaf: np.repeat(leaf, 2, axis=1), batch.example),
    )  # fmt: skip
    update = make_update(model, OBJECTIVE, RULE, privacy=SILENT)
    state = init_state(model, jax.tree.map(jnp.array, params), RULE)
    with pytest.raises(ValueError, match="rows have 2 slots, but a row of a private batch holds one pair"):
        update(state, double, private_key=ROOT)


def test_what_units_said_is_told_only_to_those_who_ask(decoder, batch_of):
    model, params = decoder("tied")
    update = make_update(model, OBJECTIVE, RULE, privacy=SILENT, return_unit_metrics=True)
    state = init_state(model, jax.tree.map(jnp.array, params), RULE)
    _, metrics = update(state, batch_of("pair", 8), private_key=ROOT)
    assert set(metrics) == {"grad_norm", "param_norm", "private/norm", "private/loss"}
    assert np.isfinite(metrics["private/norm"]).sum() == 6
