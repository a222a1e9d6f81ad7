"""Value and Q heads: outputs, Q guidance, sharding, saving and loading."""

import chex
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
def model_and_params():
    """A model with heads, and parameters with nonzero heads."""
    model = ModelWithHeads.of(Model.from_config(CONFIG), KINDS, q_guidance=1.5)
    params = model.with_heads(init_params(model.without_heads(), jax.random.key(0)), jax.random.key(1))
    heads = jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(jax.random.key(2), leaf.shape), params[HEADS])
    heads["q2"]["kernel"] += 0.05
    return model, params | {HEADS: heads}


def test_head_values(model_and_params):
    model, params = model_and_params
    hidden = jax.random.normal(jax.random.key(3), (2, 5, 32))
    tokens = jax.random.randint(jax.random.key(4), (2, 5), 0, 48)
    values, heads = model.head_values(params[HEADS], hidden, tokens), params[HEADS]
    expected = hidden @ heads["value"]["kernel"] + heads["value"]["bias"]
    np.testing.assert_allclose(values["value"], expected, rtol=1e-5, atol=1e-5)
    for name in ("q1", "q2"):
        expected = token_stats_from_logits(hidden @ heads[name]["kernel"], tokens)
        np.testing.assert_allclose(values[name].logp, expected.logp, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(values[name].lse, expected.lse, rtol=1e-4, atol=1e-5)


def test_q_guidance_adds_the_minimum_of_the_q_heads(model_and_params):
    model, params = model_and_params
    tokens = jax.random.randint(jax.random.key(5), (2, 6), 0, 48)
    hidden, base = model.hidden(params, tokens), model.without_heads()
    decoder = {name: part for name, part in params.items() if name != HEADS}
    np.testing.assert_array_equal(hidden, base.hidden(decoder, tokens))
    minimum = np.minimum(*(np.asarray(hidden @ params[HEADS][name]["kernel"]) for name in ("q1", "q2")))
    np.testing.assert_allclose(
        model.project(params, hidden), base.project(decoder, hidden) + 1.5 * minimum, rtol=1e-5, atol=1e-5
    )
    # Guidance affects sampling only, not the statistics that losses use.
    chex.assert_trees_all_equal(model.token_stats(params, hidden, tokens), base.token_stats(decoder, hidden, tokens))


def test_new_heads_barely_change_the_policy():
    model = ModelWithHeads.of(Model.from_config(CONFIG), KINDS, q_guidance=10.0)
    decoder = init_params(model.without_heads(), jax.random.key(0))
    params = model.with_heads(decoder, jax.random.key(1))
    hidden = model.hidden(params, jnp.arange(12)[None])
    change = model.project(params, hidden) - model.without_heads().project(decoder, hidden)
    assert 0 < float(jnp.max(jnp.abs(change))) < 0.5
    assert not np.any(params[HEADS]["value"]["kernel"])
    assert np.any(np.asarray(params[HEADS]["q1"]["kernel"]) != np.asarray(params[HEADS]["q2"]["kernel"]))


@pytest.mark.slow
def test_sharded_heads_match_unsharded(model_and_params):
    model, params = model_and_params
    sharded = ModelWithHeads.of(Model.from_config(CONFIG, mesh=make_mesh("fsdp=4,tensor=2")), KINDS)
    heads = sharded.with_heads(init_params(sharded.without_heads(), jax.random.key(0)), jax.random.key(1))[HEADS]
    assert heads["q1"]["kernel"].sharding.spec == PartitionSpec("fsdp", "tensor")
    unsharded = ModelWithHeads.of(model.without_heads(), KINDS).with_heads({}, jax.random.key(1))[HEADS]
    chex.assert_trees_all_equal(jax.device_get(heads), jax.device_get(unsharded))
    hidden = jax.random.normal(jax.random.key(3), (4, 5, 32))
    tokens = jax.random.randint(jax.random.key(4), (4, 5), 0, 48)
    placed = jax.tree.map(lambda leaf, head: jax.device_put(leaf, head.sharding), params[HEADS], heads)
    expected = model.head_values(params[HEADS], hidden, tokens)
    chex.assert_trees_all_close(sharded.head_values(placed, hidden, tokens), expected, rtol=1e-4, atol=1e-5)


def test_save_and_load(model_and_params, tmp_path):
    model, params = model_and_params
    model.save(params, tmp_path)
    decoder = {name: part for name, part in params.items() if name != HEADS}
    loaded_model, loaded_params = ModelWithHeads.load(model.without_heads(), decoder, tmp_path)
    assert loaded_model == model
    chex.assert_trees_all_equal(loaded_params, params)
    unchanged_model, unchanged_params = ModelWithHeads.load(model.without_heads(), decoder, tmp_path / "without heads")
    assert unchanged_model == model.without_heads() and unchanged_params is decoder


def test_unknown_kind_raises():
    with pytest.raises(ValueError, match="head 'advantage' has unknown kind 'a'; the kinds are value and q"):
        ModelWithHeads.of(Model.from_config(CONFIG), {"advantage": "a"})
