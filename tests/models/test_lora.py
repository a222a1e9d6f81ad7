"""LoRA adapters: forward pass, gradients, merging, sharding and configuration errors."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import PartitionSpec

from shiq_jax.models import DecoderConfig, Lora, Model, init_params, is_adapter, load_hf, save_hf
from shiq_jax.models.lora import TARGETS, only_adapters
from shiq_jax.sharding import make_mesh
from shiq_jax.training.state import init_state, merge

CONFIG = DecoderConfig(vocab_size=48, hidden_size=32, intermediate_size=48, num_layers=3, num_heads=4, num_kv_heads=2)
LORA = Lora(rank=4, alpha=6.0)
TOKENS = np.random.default_rng(0).integers(48, size=(2, 9))
MODULES = {
    "q_proj": ("attention", "query"), "k_proj": ("attention", "key"), "v_proj": ("attention", "value"),
    "o_proj": ("attention", "output"), "gate_proj": ("mlp", "gate"), "up_proj": ("mlp", "up"),
    "down_proj": ("mlp", "down"),
}  # fmt: skip


pytestmark = pytest.mark.usefixtures("quick_compilation")


def perturb_adapters(params, scale=0.2):
    """Parameters with noise added to the adapters."""
    rng = np.random.default_rng(1)
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf + scale * rng.normal(size=leaf.shape) if path[-1].key in ("lora_a", "lora_b") else leaf,
        params,
    )


@pytest.fixture(scope="module")
def lora_setup():
    """(model with adapters, base parameters, parameters with nonzero adapters)."""
    model = Model.from_config(CONFIG, lora=LORA)
    base = jax.tree.map(lambda leaf: 5 * leaf, init_params(dataclasses.replace(model, lora=None), jax.random.key(0)))
    return model, base, perturb_adapters(model.with_adapters(base, jax.random.key(1)))


def test_new_adapters_leave_logits_bitwise_unchanged(lora_setup):
    model, base, _ = lora_setup
    base_model = dataclasses.replace(model, lora=None)
    params = model.with_adapters(base, jax.random.key(1))
    np.testing.assert_array_equal(model.logits(params, TOKENS), base_model.logits(base, TOKENS))
    leaves = flatten_dict(params)
    lora_a = {path: leaf for path, leaf in leaves.items() if path[-1] == "lora_a"}
    assert len(lora_a) == 7 and not any(np.any(leaf) for path, leaf in leaves.items() if path[-1] == "lora_b")
    for path, leaf in lora_a.items():
        bound = np.prod(leaf.shape[1:-1]) ** -0.5
        assert 0.9 * bound < np.abs(leaf).max() <= bound and abs(float(leaf.mean())) < bound / 4, path
    other_key = model.with_adapters(base, jax.random.key(2))
    assert np.any(lora_a["layers", "mlp", "up", "lora_a"] != other_key["layers"]["mlp"]["up"]["lora_a"])


@pytest.mark.parametrize("target", TARGETS)
def test_logits_match_a_merged_kernel(target, lora_setup):
    """One target at a time, against a decoder whose kernel has the product added in float64."""
    model, base, _ = lora_setup
    model = dataclasses.replace(model, lora=Lora(4, 6.0, (target,)))
    params = perturb_adapters(model.with_adapters(base, jax.random.key(1)))
    assert len(flatten_dict(only_adapters(params))) == 2
    block, name = MODULES[target]
    linear = jax.device_get(params["layers"][block][name])
    a, b = (np.asarray(linear[key], np.float64) for key in ("lora_a", "lora_b"))
    product = np.stack([np.tensordot(x, y, 1) for x, y in zip(a, b)])
    merged = jax.tree.map(jnp.array, base)
    merged["layers"][block][name]["kernel"] = jnp.asarray(linear["kernel"] + 1.5 * product, jnp.float32)
    base_model = dataclasses.replace(model, lora=None)
    logits = model.logits(params, TOKENS)
    np.testing.assert_allclose(logits, base_model.logits(merged, TOKENS), rtol=1e-4, atol=1e-4)
    assert np.abs(logits - base_model.logits(base, TOKENS)).max() > 1e-2


@pytest.mark.parametrize("variant", ["tied", "biases", "odd heads"])
def test_merged_export_matches_transformers(variant, llama, tmp_path):
    import torch
    import transformers

    _, directory = llama(variant)
    base_model, base = load_hf(directory)
    model = dataclasses.replace(base_model, lora=LORA)
    params = perturb_adapters(model.with_adapters(base, jax.random.key(1)), 0.1)
    save_hf(model, params, tmp_path / "merged")
    reference = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="eager").eval()
    tokens = TOKENS % base_model.config.vocab_size
    with torch.no_grad():
        expected = reference(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(model.logits(params, tokens), expected, rtol=1e-3, atol=2e-4)
    assert np.abs(expected - base_model.logits(base, tokens)).max() > 1e-2
    reloaded, merged = load_hf(tmp_path / "merged")
    assert reloaded.lora is None and jax.tree.structure(merged) == jax.tree.structure(base)


def test_without_adapters_returns_the_base_arrays(lora_setup):
    model, base, params = lora_setup
    base_model, base_params = model.without_adapters(params)
    assert base_model.lora is None
    assert all(x is y for x, y in zip(jax.tree.leaves(base_params), jax.tree.leaves(base), strict=True))


def test_cached_decoding_matches_forward(lora_setup):
    model, _, params = lora_setup
    positions = jnp.arange(9)[None].repeat(2, 0)
    hidden, cache = model.extend(params, model.init_cache(2, 12), TOKENS[:, :6], positions[:, :6], 0)
    continued, _ = model.extend(params, cache, TOKENS[:, 6:], positions[:, 6:], 6)
    expected = model.hidden(params, TOKENS)
    np.testing.assert_allclose(np.concatenate([hidden, continued], 1), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_adapter_gradients_match_the_merged_kernel(remat, lora_setup):
    """With W' = W + s A B: dA = s G B^T and dB = s A^T G, where G is the gradient of W'."""
    model, base, params = lora_setup
    model = dataclasses.replace(model, remat=remat)
    base_model = dataclasses.replace(model, lora=None)
    weights = jnp.asarray(np.random.default_rng(2).normal(size=(2, 9, 48)), jnp.float32)

    def merge_kernels(adapters):
        out = dict(flatten_dict(base))
        for path in [path for path in out if path[-1] == "kernel"]:
            a, b = (flatten_dict(adapters).get((*path[:-1], name)) for name in ("lora_a", "lora_b"))
            if a is not None:
                product = jnp.einsum("lir,lro->lio", a.reshape(3, -1, 4), b.reshape(3, 4, -1), precision="highest")
                out[path] = out[path] + 1.5 * product.reshape(out[path].shape)
        return unflatten_dict(out)

    def merged_loss(adapters):
        return jnp.sum(weights * base_model.logits(merge_kernels(adapters), TOKENS))

    def adapter_loss(adapters):
        return jnp.sum(weights * model.logits(merge(adapters, base), TOKENS))

    adapters = only_adapters(params)
    grads = flatten_dict(jax.grad(adapter_loss)(adapters))
    for path, expected in flatten_dict(jax.grad(merged_loss)(adapters)).items():
        assert np.linalg.norm(grads[path] - expected) < 1e-4 * np.linalg.norm(expected), path


def test_only_adapters_are_trained(lora_setup):
    model, _, params = lora_setup
    adapters = only_adapters(params)
    state = init_state(model, params, optax.adam(1e-3), trainable=is_adapter)
    assert flatten_dict(dict(state.trainable)).keys() == flatten_dict(adapters).keys()
    moments = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state))
    assert moments < 2 * sum(leaf.size for leaf in jax.tree.leaves(adapters)) + 9


def test_sharded_adapters_match_unsharded(lora_setup):
    model, base, _ = lora_setup
    mesh = make_mesh("fsdp=2,tensor=2")
    sharded = dataclasses.replace(model, mesh=mesh)
    shapes = sharded.abstract_params()["layers"]
    assert shapes["attention"]["query"]["lora_a"].sharding.spec == PartitionSpec(None, "fsdp", None)
    assert shapes["attention"]["query"]["lora_b"].sharding.spec == PartitionSpec(None, None, "tensor", None)
    assert shapes["mlp"]["down"]["lora_a"].sharding.spec == PartitionSpec(None, "tensor", None)
    sharded_base = dataclasses.replace(sharded, lora=None)
    base = jax.device_put(base, jax.tree.map(lambda leaf: leaf.sharding, sharded_base.abstract_params()))
    expected, params = (m.with_adapters(base, jax.random.key(1)) for m in (model, sharded))
    chex.assert_trees_all_equal(jax.device_get(expected), jax.device_get(params))
    for (path, leaf), abstract in zip(flatten_dict(params).items(), flatten_dict(sharded.abstract_params()).values()):
        assert leaf.sharding.is_equivalent_to(abstract.sharding, leaf.ndim), path
    params = perturb_adapters(params)
    np.testing.assert_allclose(sharded.logits(params, TOKENS), model.logits(jax.device_get(params), TOKENS), atol=1e-4)


def test_invalid_configurations_raise(lora_setup):
    with pytest.raises(ValueError, match="rank of LoRA must be at least 1, not 0"):
        Lora(0, 1.0)
    with pytest.raises(ValueError, match="alpha of LoRA must be positive and finite, not nan"):
        Lora(4, float("nan"))
    with pytest.raises(ValueError, match="unknown LoRA target 'lm_head'; the targets are q_proj"):
        Lora(4, 8.0, ("q_proj", "lm_head"))
    model, base, params = lora_setup
    with pytest.raises(ValueError, match="the model has no lora"):
        dataclasses.replace(model, lora=None).with_adapters(base, jax.random.key(0))
    with pytest.raises(ValueError, match="parameter layers.*lora_. is missing"):
        save_hf(model, base, "/nowhere")
