"""Heads beside the vocabulary's: what they say, how they steer, where they lie, and that they come back from disk."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from shiq_jax.models import DecoderConfig, Model, ModelWithHeads, init_params
from shiq_jax.models.heads import HEADS
from shiq_jax.objectives import token_stats_from_logits
from shiq_jax.sharding import make_mesh

CONFIG = DecoderConfig(vocab_size=48, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, num_kv_heads=2)
KINDS = {"value": "value", "q1": "q", "q2": "q"}


@pytest.fixture(scope="module")
def made():
    """A headed model with parameters in which every head says something."""
    model = ModelWithHeads.of(Model.from_config(CONFIG), KINDS, q_guidance=1.5)
    params = model.with_heads(init_params(model.plain(), jax.random.key(0)), jax.random.key(1))
    heads = jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(jax.random.key(2), leaf.shape), params[HEADS])
    heads["q2"]["kernel"] += 0.05
    return model, params | {HEADS: heads}


def test_heads_say_what_their_matrices_give(made):
    model, params = made
    hidden = jax.random.normal(jax.random.key(3), (2, 5, 32))
    tokens = jax.random.randint(jax.random.key(4), (2, 5), 0, 48)
    said, heads = model.head_values(params[HEADS], hidden, tokens), params[HEADS]
    np.testing.assert_allclose(
        said["value"], hidden @ heads["value"]["kernel"] + heads["value"]["bias"], rtol=1e-5, atol=1e-5
    )
    for name in ("q1", "q2"):
        expected = token_stats_from_logits(hidden @ heads[name]["kernel"], tokens)
        np.testing.assert_allclose(said[name].logp, expected.logp, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(said[name].lse, expected.lse, rtol=1e-4, atol=1e-5)


def test_the_smaller_row_of_q_steers_what_is_sampled_from(made):
    model, params = made
    tokens = jax.random.randint(jax.random.key(5), (2, 6), 0, 48)
    hidden, plain = model.hidden(params, tokens), model.plain()
    decoder = {name: part for name, part in params.items() if name != HEADS}
    np.testing.assert_array_equal(hidden, plain.hidden(decoder, tokens))
    smaller = np.minimum(*(np.asarray(hidden @ params[HEADS][name]["kernel"]) for name in ("q1", "q2")))
    np.testing.assert_allclose(
        model.project(params, hidden), plain.project(decoder, hidden) + 1.5 * smaller, rtol=1e-5, atol=1e-5
    )
    # What is learned from are the decoder's own statistics.
    own = model.token_stats(params, hidden, tokens), plain.token_stats(decoder, hidden, tokens)
    jax.tree.map(np.testing.assert_array_equal, *own)


def test_fresh_heads_leave_the_policy_where_it_was():
    model = ModelWithHeads.of(Model.from_config(CONFIG), KINDS, q_guidance=10.0)
    decoder = init_params(model.plain(), jax.random.key(0))
    params = model.with_heads(decoder, jax.random.key(1))
    hidden = model.hidden(params, jnp.arange(12)[None])
    change = model.project(params, hidden) - model.plain().project(decoder, hidden)
    assert 0 < float(jnp.max(jnp.abs(change))) < 0.5
    assert not np.any(params[HEADS]["value"]["kernel"])
    assert np.any(np.asarray(params[HEADS]["q1"]["kernel"]) != np.asarray(params[HEADS]["q2"]["kernel"]))


def test_rows_of_q_are_cut_as_the_vocabulary_is(made):
    model, params = made
    sharded = ModelWithHeads.of(Model.from_config(CONFIG, mesh=make_mesh("fsdp=4,tensor=2")), KINDS)
    placed = sharded.with_heads(init_params(sharded.plain(), jax.random.key(0)), jax.random.key(1))
    assert placed[HEADS]["q1"]["kernel"].sharding.spec == PartitionSpec("fsdp", "tensor")
    # The same numbers, wherever they lie.
    jax.tree.map(
        lambda one, other: np.testing.assert_array_equal(one, other),
        placed[HEADS], ModelWithHeads.of(model.plain(), KINDS).with_heads({}, jax.random.key(1))[HEADS],
    )  # fmt: skip
    hidden = jax.random.normal(jax.random.key(3), (4, 5, 32))
    tokens = jax.random.randint(jax.random.key(4), (4, 5), 0, 48)
    put = jax.tree.map(lambda leaf, like: jax.device_put(leaf, like.sharding), params[HEADS], placed[HEADS])
    one, other = model.head_values(params[HEADS], hidden, tokens), sharded.head_values(put, hidden, tokens)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), one, other)


def test_heads_come_back_from_disk(made, tmp_path):
    model, params = made
    model.save(params, tmp_path)
    decoder = {name: part for name, part in params.items() if name != HEADS}
    loaded, found = ModelWithHeads.load(model.plain(), decoder, tmp_path)
    assert loaded == model
    jax.tree.map(np.testing.assert_array_equal, found, params)
    same = ModelWithHeads.load(model.plain(), decoder, tmp_path / "nothing")
    assert same[0] == model.plain() and same[1] is decoder


def test_a_kind_that_there_is_not_is_named():
    with pytest.raises(ValueError, match="head 'advantage' is of kind 'a'; the kinds are value and q"):
        ModelWithHeads.of(Model.from_config(CONFIG), {"advantage": "a"})
