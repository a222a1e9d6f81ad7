"""Llamas and Qwen3s of random small shapes: logits, gradients, files and greedy answers are those of transformers."""

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

LOGITS, GRADIENTS = 1e-4, 1e-3  # absolute; relative, per tensor
LENGTH, NEW = 40, 8
SEEDS = range(2, 26)
QUICK = SEEDS[:6]
# Of models that normalise queries and keys.
NORMED = range(26, 34)
NORMED_QUICK = NORMED[:2]


def random_config(seed: int) -> dict:
    """Arguments of `LlamaConfig`: each choice is a coin of its own."""
    draw = random.Random(seed)
    kv_heads, sharing = draw.choice([1, 2, 3, 5]), draw.choice([1, 2, 3])
    heads = kv_heads * sharing
    ropes = [{"rope_type": "default"}, {"rope_type": "linear", "factor": draw.uniform(1.5, 8)}]
    ropes += 2 * [
        {
            "rope_type": "llama3",
            "factor": draw.uniform(2, 16),
            "low_freq_factor": draw.choice([1.0, 1.5]),
            "high_freq_factor": draw.choice([2.0, 4.0, 6.0]),
            "original_max_position_embeddings": draw.choice([12, 24, 64]),
        }
    ]
    return {
        "vocab_size": draw.randint(31, 90),
        "hidden_size": heads * -(-draw.randint(9, 40) // heads),
        "intermediate_size": draw.randint(7, 60),
        "num_hidden_layers": draw.randint(1, 3),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": draw.choice([2, 4, 6, 10, 16]),
        "rms_norm_eps": draw.choice([1e-6, 1e-5, 1e-3]),
        "tie_word_embeddings": draw.random() < 0.5,
        "attention_bias": draw.random() < 0.5,
        "mlp_bias": draw.random() < 0.5,
        "rope_parameters": draw.choice(ropes) | {"rope_theta": draw.choice([100.0, 10000.0, 500000.0])},
        "max_position_embeddings": 128,
        "bos_token_id": None,
        "eos_token_id": None,
    }


pytestmark = pytest.mark.usefixtures("quick_compilation")


@dataclasses.dataclass
class Case:
    """A model of transformers, the directory that holds it, the same loaded by us, and tokens to read."""

    theirs: transformers.PreTrainedModel
    directory: object
    model: object
    params: dict
    tokens: np.ndarray


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(seed, marks=[] if seed in (*QUICK, *NORMED_QUICK) else [pytest.mark.slow])
        for seed in (*SEEDS, *NORMED)
    ],
)
def case(request, tmp_path_factory):
    transformers.utils.logging.disable_progress_bar()
    sizes = random_config(request.param)
    if request.param in NORMED:
        sizes.pop("mlp_bias")
        theirs = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**sizes, attn_implementation="eager")).eval()
    else:
        theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, attn_implementation="eager")).eval()
    generator = torch.Generator().manual_seed(request.param)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            scale = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.3
            parameter.copy_(noise * scale + (1.0 if "norm" in name else 0.0))
    directory = tmp_path_factory.mktemp("llama")
    theirs.save_pretrained(directory)
    tokens = np.random.default_rng(request.param).integers(0, sizes["vocab_size"], (2, LENGTH))
    return Case(theirs, directory, *load_hf(directory), tokens)


def test_the_sweep_has_everything_in_it():
    for seeds in (QUICK, SEEDS):
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
        stretched = [config for config in configs if config["rope_parameters"]["rope_type"] == "llama3"]
        assert {True, False} == {config["tie_word_embeddings"] for config in stretched}


def test_logits_and_gradients(case, tmp_path):
    weights = np.random.default_rng(1).standard_normal((2, LENGTH - 1)).astype(np.float32)
    logits = case.theirs(torch.tensor(case.tokens)).logits
    logp = torch.log_softmax(logits[:, :-1], -1).gather(-1, torch.tensor(case.tokens[:, 1:, None]))[..., 0]
    lse = torch.logsumexp(logits[:, :-1], -1)
    # Both statistics that losses are made of, so that shifts of the logits count too.
    (torch.tensor(weights) * (logp + torch.sin(lse))).sum().backward()

    def loss(params):
        hidden = case.model.hidden(params, jnp.asarray(case.tokens))
        stats = case.model.token_stats(params, hidden[:, :-1], jnp.asarray(case.tokens[:, 1:]))
        return jnp.sum(weights * (stats.logp + jnp.sin(stats.lse))), case.model.project(params, hidden)

    gradient, found = jax.jit(jax.grad(loss, has_aux=True))(case.params)
    assert logits.abs().max() > 1
    np.testing.assert_allclose(found, logits.detach().numpy(), atol=LOGITS, rtol=0)
    # Written as a checkpoint, the gradient has transformers' names and layouts.
    save_hf(case.model, gradient, tmp_path)
    ours = load_file(tmp_path / "model.safetensors")
    expected = {name: parameter.grad.numpy() for name, parameter in case.theirs.named_parameters()}
    assert ours.keys() == expected.keys()
    norms = {name: np.linalg.norm(expected[name]) for name in expected}
    errors = {name: np.linalg.norm(ours[name] - expected[name]) / norms[name] for name in expected}
    assert min(norms.values()) > 0 and max(errors.values()) < GRADIENTS, errors


def test_files_and_greedy_answers(case, tmp_path, monkeypatch):
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(case.params))
    monkeypatch.setattr(huggingface, "SHARD_BYTES", size // 3)
    save_hf(case.model, case.params, tmp_path)
    files = list(tmp_path.glob("*.safetensors"))
    written = {name: tensor for file in files for name, tensor in load_file(file).items()}
    expected = load_file(case.directory / "model.safetensors")
    assert len(files) > 2 and written.keys() == expected.keys()
    for name in expected:
        np.testing.assert_array_equal(written[name], expected[name], strict=True)
        assert written[name].tobytes() == expected[name].tobytes()
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == expected.keys() and index["metadata"]["total_size"] == size
    assert size == sum(4 * math.prod(tensor.shape) for tensor in expected.values())

    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    prompts = torch.tensor(case.tokens[:, :9])
    settings = dict(attention_mask=torch.ones_like(prompts), do_sample=False, max_new_tokens=NEW, pad_token_id=0)
    answers = [model.generate(prompts, **settings) for model in (case.theirs, exported)]
    assert torch.equal(*answers) and answers[0].shape == (2, 9 + NEW)
