"""Adapters: what they add, what they leave alone, where they lie, and that transformers computes the same."""

import dataclasses

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


def noisy(params, scale=0.2):
    """Parameters with adapters that have learned something."""
    rng = np.random.default_rng(1)
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf + scale * rng.normal(size=leaf.shape) if path[-1].key in ("lora_a", "lora_b") else leaf,
        params,
    )


@pytest.fixture(scope="module")
def made():
    """(model with adapters, its base's parameters, those with adapters that show)."""
    model = Model.from_config(CONFIG, lora=LORA)
    base = jax.tree.map(lambda leaf: 5 * leaf, init_params(dataclasses.replace(model, lora=None), jax.random.key(0)))
    return model, base, noisy(model.with_adapters(base, jax.random.key(1)))


def test_fresh_adapters_change_no_bit(made):
    model, base, _ = made
    plain = dataclasses.replace(model, lora=None)
    fresh = model.with_adapters(base, jax.random.key(1))
    np.testing.assert_array_equal(model.logits(fresh, TOKENS), plain.logits(base, TOKENS))
    flat = flatten_dict(fresh)
    drawn = {path: leaf for path, leaf in flat.items() if path[-1] == "lora_a"}
    assert len(drawn) == 7 and not any(np.any(leaf) for path, leaf in flat.items() if path[-1] == "lora_b")
    for path, leaf in drawn.items():
        bound = np.prod(leaf.shape[1:-1]) ** -0.5
        assert 0.9 * bound < np.abs(leaf).max() <= bound and abs(float(leaf.mean())) < bound / 4, path
    again = model.with_adapters(base, jax.random.key(2))
    assert np.any(drawn["layers", "mlp", "up", "lora_a"] != again["layers"]["mlp"]["up"]["lora_a"])


@pytest.mark.parametrize("target", TARGETS)
def test_a_kernel_acts_as_the_sum_of_itself_and_the_product(target, made):
    """One target at a time, against a decoder into whose kernel the product is written in float64."""
    model, base, _ = made
    model = dataclasses.replace(model, lora=Lora(4, 6.0, (target,)))
    params = noisy(model.with_adapters(base, jax.random.key(1)))
    assert len(flatten_dict(only_adapters(params))) == 2
    part, name = MODULES[target]
    node = jax.device_get(params["layers"][part][name])
    a, b = (np.asarray(node[each], np.float64) for each in ("lora_a", "lora_b"))
    joined = np.stack([np.tensordot(x, y, 1) for x, y in zip(a, b)])
    whole = jax.tree.map(jnp.array, base)
    whole["layers"][part][name]["kernel"] = jnp.asarray(node["kernel"] + 1.5 * joined, jnp.float32)
    expected = dataclasses.replace(model, lora=None).logits(whole, TOKENS)
    found = model.logits(params, TOKENS)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert np.abs(found - dataclasses.replace(model, lora=None).logits(base, TOKENS)).max() > 1e-2


@pytest.mark.parametrize("variant", ["tied", "biases", "odd heads"])
def test_merged_they_are_what_transformers_computes(variant, llama, tmp_path):
    import torch
    import transformers

    _, directory = llama(variant)
    plain, base = load_hf(directory)
    model = dataclasses.replace(plain, lora=LORA)
    params = noisy(model.with_adapters(base, jax.random.key(1)), 0.1)
    save_hf(model, params, tmp_path / "merged")
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="eager").eval()
    tokens = TOKENS % plain.config.vocab_size
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(model.logits(params, tokens), expected, rtol=1e-3, atol=2e-4)
    assert np.abs(expected - plain.logits(base, tokens)).max() > 1e-2
    # What comes back is a plain decoder.
    again, merged = load_hf(tmp_path / "merged")
    assert again.lora is None and jax.tree.structure(merged) == jax.tree.structure(base)


def test_switching_off_gives_the_base_itself(made):
    model, base, params = made
    plain, found = model.switched_off(params)
    assert plain.lora is None
    assert all(mine is theirs for mine, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(base), strict=True))


def test_cached_decoding_is_the_forward_pass(made):
    model, _, params = made
    positions = jnp.arange(9)[None].repeat(2, 0)
    hidden, cache = model.extend(params, model.init_cache(2, 12), TOKENS[:, :6], positions[:, :6], 0)
    more, _ = model.extend(params, cache, TOKENS[:, 6:], positions[:, 6:], 6)
    expected = model.hidden(params, TOKENS)
    np.testing.assert_allclose(np.concatenate([hidden, more], 1), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_only_adapters_learn_and_their_gradient_is_that_of_the_product(remat, made):
    """With W' = W + s A B: dA = s G B^T and dB = s A^T G, G the gradient of a decoder that holds W'."""
    model, base, params = made
    model = dataclasses.replace(model, remat=remat)
    plain = dataclasses.replace(model, lora=None)
    weights = jnp.asarray(np.random.default_rng(2).normal(size=(2, 9, 48)), jnp.float32)

    def whole(params):
        out = dict(flatten_dict(base))
        for path in [path for path in out if path[-1] == "kernel"]:
            a, b = (flatten_dict(params).get((*path[:-1], name)) for name in ("lora_a", "lora_b"))
            if a is not None:
                product = jnp.einsum("lir,lro->lio", a.reshape(3, -1, 4), b.reshape(3, 4, -1), precision="highest")
                out[path] = out[path] + 1.5 * product.reshape(out[path].shape)
        return out

    def through_product(adapters):
        return jnp.sum(weights * plain.logits(unflatten_dict(whole(adapters)), TOKENS))

    def through_adapters(adapters):
        return jnp.sum(weights * model.logits(merge(adapters, base), TOKENS))

    learned = only_adapters(params)
    found, expected = jax.grad(through_adapters)(learned), jax.grad(through_product)(learned)
    for path, leaf in flatten_dict(expected).items():
        mine = flatten_dict(found)[path]
        assert np.linalg.norm(mine - leaf) < 1e-4 * np.linalg.norm(leaf), path
    state = init_state(model, params, optax.adam(1e-3), trainable=is_adapter)
    assert flatten_dict(dict(state.trainable)).keys() == flatten_dict(learned).keys()
    moments = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state))
    assert moments < 2 * sum(leaf.size for leaf in jax.tree.leaves(learned)) + 9


def test_on_a_mesh_they_lie_beside_their_kernels_and_say_the_same(made):
    model, base, _ = made
    mesh = make_mesh("fsdp=2,tensor=2")
    spread = dataclasses.replace(model, mesh=mesh)
    shapes = spread.abstract_params()["layers"]
    assert shapes["attention"]["query"]["lora_a"].sharding.spec == PartitionSpec(None, "fsdp", None)
    assert shapes["attention"]["query"]["lora_b"].sharding.spec == PartitionSpec(None, None, "tensor", None)
    assert shapes["mlp"]["down"]["lora_a"].sharding.spec == PartitionSpec(None, "tensor", None)
    plain = dataclasses.replace(spread, lora=None)
    base = jax.device_put(base, jax.tree.map(lambda leaf: leaf.sharding, plain.abstract_params()))
    alone, here = (each.with_adapters(base, jax.random.key(1)) for each in (model, spread))
    jax.tree.map(np.testing.assert_array_equal, alone, jax.device_get(here))
    for (path, leaf), like in zip(flatten_dict(here).items(), flatten_dict(spread.abstract_params()).values()):
        assert leaf.sharding.is_equivalent_to(like.sharding, leaf.ndim), path
    params = noisy(here)
    np.testing.assert_allclose(spread.logits(params, TOKENS), model.logits(jax.device_get(params), TOKENS), atol=1e-4)


def test_what_there_is_not_is_refused(made):
    with pytest.raises(ValueError, match="rank of LoRA must be at least 1, not 0"):
        Lora(0, 1.0)
    with pytest.raises(ValueError, match="alpha of LoRA must be positive and finite, not nan"):
        Lora(4, float("nan"))
    with pytest.raises(ValueError, match="LoRA has no target 'lm_head'; the targets are q_proj"):
        Lora(4, 8.0, ("q_proj", "lm_head"))
    model, base, params = made
    with pytest.raises(ValueError, match="the model has no lora"):
        dataclasses.replace(model, lora=None).with_adapters(base, jax.random.key(0))
    with pytest.raises(ValueError, match="parameter layers.*lora_. has shape none: it is missing"):
        save_hf(model, base, "/nowhere")
