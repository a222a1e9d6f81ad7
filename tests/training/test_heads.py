"""Updates of heads: against one record at a time on whole matrices, with slow copies, and what stays as it was."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from shiq_jax.models import ModelWithHeads
from shiq_jax.models.heads import HEADS
from shiq_jax.objectives import OBJECTIVES, ilql_loss, oreo_loss, token_stats_from_logits
from shiq_jax.replay import Buffer, pack, pack_groups, plan
from shiq_jax.training.placement import place
from shiq_jax.training.state import init_state, polyak_average
from shiq_jax.training.update import make_update

RULE = optax.sgd(1.0)
ILQL = OBJECTIVES["ilql"].configure(gamma=0.9, tau=0.8, alpha=0.3)._replace(polyak=0.25)
OREO = OBJECTIVES["oreo"].configure(beta=0.5)


@pytest.fixture(scope="module")
def references(records):
    rng = np.random.default_rng(3)
    counts = [len(record.rewards) for record in records]
    return [tuple(rng.normal((-3, 4), 1, (count, 2)).astype(np.float32).T) for count in counts]


@pytest.fixture(scope="module")
def begin(model, host_params, records, references, requested_mesh, tmp_path_factory):
    """(model, state, batch) of an objective, on a mesh or on none, every head with something to say."""
    buffer = Buffer.create(tmp_path_factory.mktemp("replay") / "buffer")
    buffer.append(records)

    def start(objective, mesh=None):
        headed = ModelWithHeads.of(model, objective.heads)
        params = headed.with_heads(jax.tree.map(jnp.array, host_params), jax.random.key(1))
        keys = iter(jax.random.split(jax.random.key(2), 8))
        params[HEADS] = jax.tree.map(lambda leaf: leaf + 0.3 * jax.random.normal(next(keys), leaf.shape), params[HEADS])
        if mesh is not None:
            headed = ModelWithHeads.of(dataclasses.replace(model, mesh=requested_mesh(mesh)), objective.heads)
            params = jax.tree.map(
                lambda leaf, like: jax.device_put(leaf, like.sharding), params, headed.abstract_params()
            )
        slow = {name: jax.tree.map(lambda leaf: leaf * 0.9 - 0.1, params[HEADS][name]) for name in objective.target_heads}
        drawn = pack_groups(buffer, objective.unit)
        known = {"reference": references} if "references" in objective.needs else {}
        shape = plan(buffer, drawn, multiple=8)
        batch = place(pack(drawn, buffer, shape, references=known, rows_multiple=8).batch, headed.mesh)
        state = init_state(
            headed, params, RULE, targets=lambda _: {HEADS: slow} if slow else {},
            trainable=None if objective.trains_policy else lambda path: path[0] == HEADS,
        )  # fmt: skip
        return headed, jax.device_get(params), jax.device_get(slow), state, batch

    return start


def gradient_of(before, state):
    """Plain descent with a rate of 1 moves parameters by the gradient."""
    return jax.tree.map(lambda old, new: old - np.asarray(new), before, jax.device_get(state.params()))


def dense_heads(model, params, heads, data):
    """What heads say of every token of every record, from whole matrices, on hidden states that are constants."""
    hidden = jax.lax.stop_gradient(model.hidden(params, data.tokens))[:, :-1]
    found = {}
    for name, head in heads.items():
        if "bias" in head:
            found[name] = hidden @ head["kernel"] + head["bias"]
        else:
            found[name] = jax.vmap(token_stats_from_logits)(hidden @ head["kernel"], data.tokens[:, 1:])
    return found


def test_ilql_is_that_of_each_record_alone_and_leaves_the_decoder_alone(begin, model, records, dense, relative):
    headed, before, slow, state, batch = begin(ILQL)
    data = dense(records)

    def naive(heads):
        said, copies = (dense_heads(model, _decoder(before), each, data) for each in (heads, slow))
        one = lambda q1, q2, v, t1, t2, r, m: ilql_loss(  # noqa: E731
            (q1, q2), v, (t1, t2), r, m, gamma=0.9, tau=0.8, alpha=0.3
        )
        losses = jax.vmap(one)(
            said["q1"], said["q2"], said["value"], copies["q1"], copies["q2"], data.rewards, data.mask
        )
        return jnp.sum(losses) / data.mask.sum()

    loss, expected = jax.value_and_grad(naive)(before[HEADS])
    state, metrics = make_update(headed, ILQL, RULE)(state, batch)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    found = gradient_of(before, state)
    assert relative(found[HEADS], jax.device_get(expected)) < 2e-5
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(_decoder(found)))
    # The copies go a quarter of the way to the heads that have just learned.
    heads, copies = jax.device_get((state.params()[HEADS], state.targets[HEADS]))
    jax.tree.map(
        lambda old, new, now: np.testing.assert_allclose(now, 0.75 * old + 0.25 * new, rtol=1e-5, atol=1e-6),
        slow, {name: heads[name] for name in slow}, copies,
    )  # fmt: skip


def test_oreo_moves_the_decoder_by_the_policys_square_alone(begin, model, records, references, dense, relative):
    headed, before, _, state, batch = begin(OREO)
    data = dense(records, references)

    def naive(params):
        decoder = _decoder(params)
        v = dense_heads(model, decoder, params[HEADS], data)["value"]
        losses = jax.vmap(lambda *x: oreo_loss(*x, beta=0.5))(
            data.statistics(model, decoder), data.reference, v, data.rewards, data.mask
        )
        return jnp.mean(losses)

    loss, expected = jax.value_and_grad(naive)(before)
    state, metrics = make_update(headed, OREO, RULE)(state, batch)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    assert relative(gradient_of(before, state), jax.device_get(expected)) < 2e-5


@pytest.mark.parametrize("objective", [ILQL, OREO], ids=["ilql", "oreo"])
def test_microbatches_and_devices_change_nothing(begin, objective, relative):
    headed, before, _, state, batch = begin(objective)
    state, metrics = make_update(headed, objective, RULE)(state, batch)
    expected = gradient_of(before, state)[HEADS], jax.device_get(state.targets)
    for mesh, pieces in ((None, 4), ("fsdp=2,tensor=2", 2)):
        headed, before, _, state, batch = begin(objective, mesh)
        state, other = make_update(headed, objective, RULE, microbatches=pieces)(state, batch)
        np.testing.assert_allclose(other["loss"], metrics["loss"], rtol=1e-5)
        found = gradient_of(before, state)[HEADS], jax.device_get(state.targets)
        assert relative(found, expected) < 2e-5


def test_followers_go_part_of_the_way():
    slow = {"a": {"b": jnp.array([0.0, 2.0])}}
    found = polyak_average(slow, {"a": {"b": jnp.array([1.0, 4.0]), "c": jnp.ones(3)}, "d": jnp.ones(2)}, 0.1)
    assert list(found) == ["a"] and list(found["a"]) == ["b"]
    np.testing.assert_allclose(found["a"]["b"], [0.1, 2.2])


def _decoder(tree):
    return {name: part for name, part in tree.items() if name != HEADS}
