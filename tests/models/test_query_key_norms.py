"""Queries and keys that are normalised: read as such, decoded from a cache, cut over devices."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from shiq_jax.models import DecoderConfig, Model
from shiq_jax.sharding import make_mesh

CONFIG = DecoderConfig(
    vocab_size=48, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=10,
    qk_norm=True,
)  # fmt: skip
TOKENS = np.random.default_rng(0).integers(48, size=(2, 9))


@pytest.fixture(scope="module")
def made(draw):
    model = Model.from_config(CONFIG)
    return model, draw(model)


def test_the_scale_of_queries_and_keys_is_undone_and_that_of_their_norms_shows(made):
    model, params = made
    before = model.logits(params, TOKENS)

    def times(name, part, factor):
        changed = jax.tree.map(jnp.array, params)
        changed["layers"]["attention"][name][part] *= factor
        return np.abs(model.logits(changed, TOKENS) - before).max()

    for name in ("query", "key"):
        assert times(name, "kernel", 64.0) < 1e-3
        assert times(f"{name}_norm", "scale", 2.0) > 1e-3


def test_cached_decoding_is_the_forward_pass(made):
    model, params = made
    positions = jnp.arange(9)[None].repeat(2, 0)
    hidden, cache = model.extend(params, model.init_cache(2, 12), TOKENS[:, :6], positions[:, :6], 0)
    more, _ = model.extend(params, cache, TOKENS[:, 6:], positions[:, 6:], 6)
    np.testing.assert_allclose(np.concatenate([hidden, more], 1), model.hidden(params, TOKENS), rtol=1e-4, atol=1e-5)


def test_devices_change_nothing(made):
    model, params = made
    spread = dataclasses.replace(model, mesh=make_mesh("fsdp=2,tensor=2"))
    where = jax.tree.map(lambda leaf: leaf.sharding, spread.abstract_params())
    assert where["layers"]["attention"]["query_norm"]["scale"].spec == PartitionSpec(None, None)
    found = spread.logits(jax.device_put(params, where), TOKENS)
    np.testing.assert_allclose(found, model.logits(params, TOKENS), rtol=1e-4, atol=1e-4)


def test_what_a_file_leaves_out_is_what_its_family_means_by_it():
    sizes = dict(vocab_size=9, hidden_size=64, intermediate_size=8, num_hidden_layers=1, num_attention_heads=32)
    normed = DecoderConfig.from_dict(sizes | {"model_type": "qwen3"})
    assert normed.qk_norm and (normed.head_dim, normed.num_kv_heads) == (128, 32)
    plain = DecoderConfig.from_dict(sizes | {"model_type": "llama"})
    assert not plain.qk_norm and (plain.head_dim, plain.num_kv_heads) == (2, 32)
    assert normed.to_dict()["model_type"] == "qwen3" and plain.to_dict()["architectures"] == ["LlamaForCausalLM"]
