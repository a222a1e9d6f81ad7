"""RMS-normalized queries and keys (`qk_norm`): forward pass, cached decoding, sharding and config defaults."""

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
def model_and_params(random_params):
    model = Model.from_config(CONFIG)
    return model, random_params(model)


def test_norms_cancel_the_scale_of_queries_and_keys(model_and_params):
    model, params = model_and_params
    logits = model.logits(params, TOKENS)

    def change_after_scaling(module, parameter, factor):
        scaled = jax.tree.map(jnp.array, params)
        scaled["layers"]["attention"][module][parameter] *= factor
        return np.abs(model.logits(scaled, TOKENS) - logits).max()

    for name in ("query", "key"):
        assert change_after_scaling(name, "kernel", 64.0) < 1e-3
        assert change_after_scaling(f"{name}_norm", "scale", 2.0) > 1e-3


def test_cached_decoding_matches_forward(model_and_params):
    model, params = model_and_params
    positions = jnp.arange(9)[None].repeat(2, 0)
    hidden, cache = model.extend(params, model.init_cache(2, 12), TOKENS[:, :6], positions[:, :6], 0)
    continued, _ = model.extend(params, cache, TOKENS[:, 6:], positions[:, 6:], 6)
    expected = model.hidden(params, TOKENS)
    np.testing.assert_allclose(np.concatenate([hidden, continued], 1), expected, rtol=1e-4, atol=1e-5)


def test_sharded_logits_match_unsharded(model_and_params):
    model, params = model_and_params
    sharded = dataclasses.replace(model, mesh=make_mesh("fsdp=2,tensor=2"))
    shardings = jax.tree.map(lambda leaf: leaf.sharding, sharded.abstract_params())
    assert shardings["layers"]["attention"]["query_norm"]["scale"].spec == PartitionSpec(None, None)
    logits = sharded.logits(jax.device_put(params, shardings), TOKENS)
    np.testing.assert_allclose(logits, model.logits(params, TOKENS), rtol=1e-4, atol=1e-4)


def test_config_defaults_depend_on_the_model_type():
    sizes = dict(vocab_size=9, hidden_size=64, intermediate_size=8, num_hidden_layers=1, num_attention_heads=32)
    qwen = DecoderConfig.from_dict(sizes | {"model_type": "qwen3"})
    assert qwen.qk_norm and (qwen.head_dim, qwen.num_kv_heads) == (128, 32)
    llama = DecoderConfig.from_dict(sizes | {"model_type": "llama"})
    assert not llama.qk_norm and (llama.head_dim, llama.num_kv_heads) == (2, 32)
    assert qwen.to_dict()["model_type"] == "qwen3" and llama.to_dict()["architectures"] == ["LlamaForCausalLM"]
