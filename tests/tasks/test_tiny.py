"""The tiny model directory: tokenizer, compatibility with transformers and reproducibility."""

import hashlib
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shiq_jax.tasks.tiny import SPECIAL_TOKENS, VOCABULARY_SIZE, tiny_config, tiny_directory, tiny_tokenizer


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tiny_directory(tmp_path_factory.mktemp("tiny"), seed=3, hidden_size=32, num_layers=2, intermediate_size=48)


@given(st.text(max_size=40))
@settings(max_examples=100, deadline=None)
def test_tokenizer_round_trip_is_one_token_per_byte(text):
    tokenizer = tiny_tokenizer()
    tokens = tokenizer(text, add_special_tokens=False).input_ids
    if not any(special in text for special in SPECIAL_TOKENS):
        assert len(tokens) == len(text.encode())
    assert tokenizer.decode(tokens) == text


def test_transformers_loads_model_and_tokenizer(directory):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    model, report = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert len(tokenizer) == model.config.vocab_size == VOCABULARY_SIZE
    tokens = tokenizer("sort 21:").input_ids
    assert tokens[0] == model.config.bos_token_id == tokenizer.bos_token_id
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits
    # The distribution of an untrained model is close to uniform, but not constant.
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    assert entropy.min() > 0.95 * np.log(VOCABULARY_SIZE)
    assert logits.std() > 0.01
    assert tokenizer.eos_token_id in model.generation_config.eos_token_id


def test_weights_depend_only_on_the_seed(tmp_path):
    def digest(name, seed):
        path = tiny_directory(tmp_path / name, seed=seed, hidden_size=16, num_layers=1, intermediate_size=16)
        return hashlib.sha256((path / "model.safetensors").read_bytes()).hexdigest()

    assert digest("a", 0) == digest("b", 0) != digest("c", 1)


def test_tied_embeddings_have_no_lm_head(tmp_path):
    from safetensors import safe_open

    path = tiny_directory(tmp_path, hidden_size=16, num_layers=1, intermediate_size=16, tie_word_embeddings=True)
    assert json.loads((path / "config.json").read_text())["tie_word_embeddings"] is True
    with safe_open(path / "model.safetensors", "numpy") as file:
        assert "lm_head.weight" not in file.keys()


@pytest.mark.parametrize(
    ("sizes", "message"), [({"hidden_size": 30}, "hidden_size=30"), ({"num_kv_heads": 3}, "num_kv_heads=3")]
)
def test_invalid_sizes_are_rejected(sizes, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**sizes)
