"""Updates of models with value and Q heads, against an unpacked computation with full head matrices."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from shiq_jax.models import ModelWithHeads
from shiq_jax.models.heads import HEADS
from shiq_jax.objectives import OBJECTIVES, ilql_loss, oreo_loss, token_stats_from_logits
from shiq_jax.replay import Buffer, pack, pack_groups, plan
from shiq_jax.training.placement import shard_batch
from shiq_jax.training.state import init_state, polyak_average
from shiq_jax.training.update import make_update

OPTIMIZER = optax.sgd(1.0)
ILQL = OBJECTIVES["ilql"].configure(gamma=0.9, tau=0.8, alpha=0.3)._replace(polyak=0.25)
OREO = OBJECTIVES["oreo"].configure(beta=0.5)


@pytest.fixture(scope="module")
def references(records):
    rng = np.random.default_rng(3)
    counts = [len(record.rewards) for record in records]
    return [tuple(rng.normal((-3, 4), 1, (count, 2)).astype(np.float32).T) for count in counts]


@pytest.fixture(scope="module")
def setup(model, host_params, records, references, get_mesh, tmp_path_factory):
    """`setup(objective, mesh=None)`: (model, params, targets, state, batch), with random heads."""
    buffer = Buffer.create(tmp_path_factory.mktemp("replay") / "buffer")
    buffer.append(records)

    def make(objective, mesh=None):
        headed = ModelWithHeads.of(model, objective.heads)
        params = headed.with_heads(jax.tree.map(jnp.array, host_params), jax.random.key(1))
        keys = iter(jax.random.split(jax.random.key(2), 8))
        params[HEADS] = jax.tree.map(lambda leaf: leaf + 0.3 * jax.random.normal(next(keys), leaf.shape), params[HEADS])
        if mesh is not None:
            headed = ModelWithHeads.of(dataclasses.replace(model, mesh=get_mesh(mesh)), objective.heads)
            params = jax.tree.map(
                lambda leaf, abstract: jax.device_put(leaf, abstract.sharding), params, headed.abstract_params()
            )
        targets = {
            name: jax.tree.map(lambda leaf: leaf * 0.9 - 0.1, params[HEADS][name]) for name in objective.target_heads
        }
        groups = pack_groups(buffer, objective.unit)
        batch_references = {"reference": references} if "references" in objective.needs else {}
        shape = plan(buffer, groups, multiple=8)
        batch = shard_batch(
            pack(groups, buffer, shape, references=batch_references, rows_multiple=8).batch, headed.mesh
        )
        state = init_state(
            headed, params, OPTIMIZER, targets=lambda _: {HEADS: targets} if targets else {},
            trainable=None if objective.trains_policy else lambda path: path[0] == HEADS,
        )  # fmt: skip
        return headed, jax.device_get(params), jax.device_get(targets), state, batch

    return make


def gradient_from_update(params, state):
    """SGD with learning rate 1 subtracts the gradient."""
    return jax.tree.map(lambda old, new: old - np.asarray(new), params, jax.device_get(state.params()))


def unpacked_head_values(model, params, heads, data):
    """Outputs of the heads at every token, from full matrices and constant hidden states."""
    hidden = jax.lax.stop_gradient(model.hidden(params, data.tokens))[:, :-1]
    values = {}
    for name, head in heads.items():
        if "bias" in head:
            values[name] = hidden @ head["kernel"] + head["bias"]
        else:
            values[name] = jax.vmap(token_stats_from_logits)(hidden @ head["kernel"], data.tokens[:, 1:])
    return values


def test_ilql_matches_unpacked_loss_and_trains_only_heads(setup, model, records, unpacked_records, relative_error):
    headed, params, targets, state, batch = setup(ILQL)
    data = unpacked_records(records)

    def expected_loss(heads):
        values, target_values = (unpacked_head_values(model, _decoder(params), tree, data) for tree in (heads, targets))
        record_loss = lambda q1, q2, v, t1, t2, r, m: ilql_loss(  # noqa: E731
            (q1, q2), v, (t1, t2), r, m, gamma=0.9, tau=0.8, alpha=0.3
        )
        losses = jax.vmap(record_loss)(
            values["q1"], values["q2"], values["value"], target_values["q1"], target_values["q2"], data.rewards,
            data.mask,
        )  # fmt: skip
        return jnp.sum(losses) / data.mask.sum()

    loss, expected = jax.value_and_grad(expected_loss)(params[HEADS])
    state, metrics = make_update(headed, ILQL, OPTIMIZER)(state, batch)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    gradient = gradient_from_update(params, state)
    assert relative_error(gradient[HEADS], jax.device_get(expected)) < 2e-5
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(_decoder(gradient)))
    heads, new_targets = jax.device_get((state.params()[HEADS], state.targets[HEADS]))
    new_heads = {name: heads[name] for name in targets}
    averaged = jax.tree.map(lambda target, head: 0.75 * target + 0.25 * head, targets, new_heads)
    chex.assert_trees_all_close(new_targets, averaged, rtol=1e-5, atol=1e-6)


def test_oreo_decoder_gradient_excludes_the_value_loss(
    setup, model, records, references, unpacked_records, relative_error
):
    headed, initial, _, state, batch = setup(OREO)
    data = unpacked_records(records, references)

    def expected_loss(params):
        decoder = _decoder(params)
        v = unpacked_head_values(model, decoder, params[HEADS], data)["value"]
        losses = jax.vmap(lambda *x: oreo_loss(*x, beta=0.5))(
            data.statistics(model, decoder), data.reference, v, data.rewards, data.mask
        )
        return jnp.mean(losses)

    loss, expected = jax.value_and_grad(expected_loss)(initial)
    state, metrics = make_update(headed, OREO, OPTIMIZER)(state, batch)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    assert relative_error(gradient_from_update(initial, state), jax.device_get(expected)) < 2e-5


@pytest.mark.parametrize("objective", [ILQL, OREO], ids=["ilql", "oreo"])
def test_update_is_invariant_to_microbatches_and_mesh(setup, objective, relative_error):
    headed, params, _, state, batch = setup(objective)
    state, metrics = make_update(headed, objective, OPTIMIZER)(state, batch)
    expected = gradient_from_update(params, state)[HEADS], jax.device_get(state.targets)
    for mesh, microbatches in ((None, 4), ("fsdp=2,tensor=2", 2)):
        headed, params, _, state, batch = setup(objective, mesh)
        update = make_update(headed, objective, OPTIMIZER, microbatches=microbatches)
        state, split_metrics = update(state, batch)
        np.testing.assert_allclose(split_metrics["loss"], metrics["loss"], rtol=1e-5)
        actual = gradient_from_update(params, state)[HEADS], jax.device_get(state.targets)
        assert relative_error(actual, expected) < 2e-5


def test_polyak_average():
    targets = {"a": {"b": jnp.array([0.0, 2.0])}}
    averaged = polyak_average(targets, {"a": {"b": jnp.array([1.0, 4.0]), "c": jnp.ones(3)}, "d": jnp.ones(2)}, 0.1)
    chex.assert_trees_all_close(averaged, {"a": {"b": np.array([0.1, 2.2])}}, rtol=1e-7)


def _decoder(tree):
    return {name: part for name, part in tree.items() if name != HEADS}
