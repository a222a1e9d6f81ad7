"""Parity with transformers on small random Llama and Qwen3 models: logits, gradients, files and greedy decoding."""

import dataclasses
import json
import math
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file

from shiq_jax.models import huggingface, load_hf, save_hf

LOGITS_ATOL, GRADIENTS_RTOL = 1e-4, 1e-3  # the relative error is per tensor, in norm
LENGTH, NEW_TOKENS = 40, 8
LLAMA_SEEDS = range(2, 26)
QUICK_LLAMA_SEEDS = LLAMA_SEEDS[:6]
QWEN_SEEDS = range(26, 34)
QUICK_QWEN_SEEDS = QWEN_SEEDS[:2]


def random_config(seed: int) -> dict:
    """Arguments of `LlamaConfig`, each drawn independently."""
    rng = random.Random(seed)
    kv_heads, group = rng.choice([1, 2, 3, 5]), rng.choice([1, 2, 3])
    heads = kv_heads * group
    ropes = [{"rope_type": "default"}, {"rope_type": "linear", "factor": rng.uniform(1.5, 8)}]
    ropes += 2 * [
        {
            "rope_type": "llama3",
            "factor": rng.uniform(2, 16),
            "low_freq_factor": rng.choice([1.0, 1.5]),
            "high_freq_factor": rng.choice([2.0, 4.0, 6.0]),
            "original_max_position_embeddings": rng.choice([12, 24, 64]),
        }
    ]
    return {
        "vocab_size": rng.randint(31, 90),
        "hidden_size": heads * -(-rng.randint(9, 40) // heads),
        "intermediate_size": rng.randint(7, 60),
        "num_hidden_layers": rng.randint(1, 3),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": rng.choice([2, 4, 6, 10, 16]),
        "rms_norm_eps": rng.choice([1e-6, 1e-5, 1e-3]),
        "tie_word_embeddings": rng.random() < 0.5,
        "attention_bias": rng.random() < 0.5,
        "mlp_bias": rng.random() < 0.5,
        "rope_parameters": rng.choice(ropes) | {"rope_theta": rng.choice([100.0, 10000.0, 500000.0])},
        "max_position_embeddings": 128,
        "bos_token_id": None,
        "eos_token_id": None,
    }


pytestmark = pytest.mark.usefixtures("quick_compilation")


@dataclasses.dataclass
class Case:
    """A transformers model, its checkpoint directory, the model and parameters loaded from it, and input tokens."""

    reference: transformers.PreTrainedModel
    directory: object
    model: object
    params: dict
    tokens: np.ndarray


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(seed, marks=[] if seed in (*QUICK_LLAMA_SEEDS, *QUICK_QWEN_SEEDS) else [pytest.mark.slow])
        for seed in (*LLAMA_SEEDS, *QWEN_SEEDS)
    ],
)
def case(request, tmp_path_factory):
    transformers.utils.logging.disable_progress_bar()
    sizes = random_config(request.param)
    if request.param in QWEN_SEEDS:
        sizes.pop("mlp_bias")
        reference = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**sizes, attn_implementation="eager"))
    else:
        reference = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, attn_implementation="eager"))
    reference.eval()
    generator = torch.Generator().manual_seed(request.param)
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            scale = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.3
            parameter.copy_(noise * scale + (1.0 if "norm" in name else 0.0))
    directory = tmp_path_factory.mktemp("llama")
    reference.save_pretrained(directory)
    tokens = np.random.default_rng(request.param).integers(0, sizes["vocab_size"], (2, LENGTH))
    return Case(reference, directory, *load_hf(directory), tokens)


def test_random_configs_cover_every_variant():
    for seeds in (QUICK_LLAMA_SEEDS, LLAMA_SEEDS):
        configs = [random_config(seed) for seed in seeds]
        for switch in ("tie_word_embeddings", "attention_bias", "mlp_bias"):
            assert {config[switch] for config in configs} == {True, False}
        heads = [(config["num_attention_heads"], config["num_key_value_heads"]) for config in configs]
        assert any(queries % 2 and queries > 1 for queries, _ in heads)
        assert any(keys == 1 < queries for queries, keys in heads) and any(
            1 < keys < queries for queries, keys in heads
        )
        assert any(keys == queries > 1 for queries, keys in heads)
        assert {config["rope_parameters"]["rope_type"] for config in configs} == {"default", "linear", "llama3"}
        llama3 = [config for config in configs if config["rope_parameters"]["rope_type"] == "llama3"]
        assert {config["tie_word_embeddings"] for config in llama3} == {True, False}


def test_logits_and_gradients_match_transformers(case, tmp_path):
    weights = np.random.default_rng(1).standard_normal((2, LENGTH - 1)).astype(np.float32)
    logits = case.reference(torch.tensor(case.tokens)).logits
    logp = torch.log_softmax(logits[:, :-1], -1).gather(-1, torch.tensor(case.tokens[:, 1:, None]))[..., 0]
    lse = torch.logsumexp(logits[:, :-1], -1)
    # lse makes the gradient depend on constant shifts of the logits, which logp ignores.
    (torch.tensor(weights) * (logp + torch.sin(lse))).sum().backward()

    def loss(params):
        hidden = case.model.hidden(params, jnp.asarray(case.tokens))
        stats = case.model.token_stats(params, hidden[:, :-1], jnp.asarray(case.tokens[:, 1:]))
        return jnp.sum(weights * (stats.logp + jnp.sin(stats.lse))), case.model.project(params, hidden)

    grads, actual_logits = jax.jit(jax.grad(loss, has_aux=True))(case.params)
    assert logits.abs().max() > 1
    np.testing.assert_allclose(actual_logits, logits.detach().numpy(), atol=LOGITS_ATOL, rtol=0)
    # Saving the gradients as a checkpoint converts them to the names and layouts of transformers.
    save_hf(case.model, grads, tmp_path)
    actual = load_file(tmp_path / "model.safetensors")
    expected = {name: parameter.grad.numpy() for name, parameter in case.reference.named_parameters()}
    assert actual.keys() == expected.keys()
    norms = {name: np.linalg.norm(expected[name]) for name in expected}
    errors = {name: np.linalg.norm(actual[name] - expected[name]) / norms[name] for name in expected}
    assert min(norms.values()) > 0 and max(errors.values()) < GRADIENTS_RTOL, errors


def test_saved_files_and_greedy_decoding_match_transformers(case, tmp_path, monkeypatch):
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(case.params))
    monkeypatch.setattr(huggingface, "SHARD_BYTES", size // 3)
    save_hf(case.model, case.params, tmp_path)
    files = list(tmp_path.glob("*.safetensors"))
    saved = {name: tensor for file in files for name, tensor in load_file(file).items()}
    expected = load_file(case.directory / "model.safetensors")
    assert len(files) > 2 and saved.keys() == expected.keys()
    for name in expected:
        np.testing.assert_array_equal(saved[name], expected[name], strict=True)
        assert saved[name].tobytes() == expected[name].tobytes()
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == expected.keys() and index["metadata"]["total_size"] == size
    assert size == sum(4 * math.prod(tensor.shape) for tensor in expected.values())

    reloaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    prompts = torch.tensor(case.tokens[:, :9])
    settings = dict(attention_mask=torch.ones_like(prompts), do_sample=False, max_new_tokens=NEW_TOKENS, pad_token_id=0)
    outputs = [model.generate(prompts, **settings) for model in (case.reference, reloaded)]
    assert torch.equal(*outputs) and outputs[0].shape == (2, 9 + NEW_TOKENS)
