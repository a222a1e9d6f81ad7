"""Small Llama models whose weights are large enough that every parameter affects the logits."""

import functools
from pathlib import Path

import jax
import numpy as np
import pytest

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
VARIANTS = {
    "untied": {},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "odd heads": {
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 6,
        "hidden_size": 36,
        "vocab_size": 53,
    },
    "llama3 rope": {"rope_parameters": LLAMA3_ROPE, "num_key_value_heads": 1},
    "linear rope": {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}},
}


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    """`llama(variant) -> (LlamaForCausalLM, checkpoint directory)`, with random norms and biases too."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()

    @functools.cache
    def make(variant: str = "untied"):
        sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3)
        heads = dict(num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-5, max_position_embeddings=256)
        config = transformers.LlamaConfig(**{**sizes, **heads, **VARIANTS[variant]}, attn_implementation="eager")
        model = transformers.LlamaForCausalLM(config).eval()
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                scale = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.3
                parameter.copy_(noise * scale + (1.0 if "norm" in name else 0.0))
        directory: Path = tmp_path_factory.mktemp("llama")
        model.save_pretrained(directory)
        return model, directory

    return make


@pytest.fixture(scope="session")
def random_params():
    """`random_params(model) -> params`: normal with std 0.2, sharded, and the same values on every mesh."""

    def make(model):
        rng = np.random.default_rng(0)

        def leaf(abstract):
            return jax.device_put(rng.normal(0, 0.2, abstract.shape).astype(abstract.dtype), abstract.sharding)

        return jax.tree.map(leaf, model.abstract_params())

    return make
