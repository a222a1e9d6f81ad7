"""Reading and writing config.json, in the formats of transformers 4 and 5."""

import dataclasses
import json

import pytest
from transformers import AutoConfig, LlamaConfig

from shiq_jax.errors import UserError
from shiq_jax.models import DecoderConfig, RopeScaling

SIZES = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 128}
SCALING = RopeScaling("llama3", 8.0, 1.0, 4.0, 128)


def test_defaults_match_transformers():
    config, reference = DecoderConfig.from_dict(SIZES), LlamaConfig(**{k: SIZES[k] for k in SIZES if k != "model_type"})
    assert (config.num_kv_heads, config.head_dim) == (reference.num_key_value_heads, reference.head_dim) == (4, 8)
    assert (config.max_positions, config.rms_norm_eps) == (reference.max_position_embeddings, reference.rms_norm_eps)
    assert config.rope_theta == reference.rope_parameters["rope_theta"]
    assert config.rope_scaling is None
    assert config.tie_word_embeddings is reference.tie_word_embeddings is False


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
        {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **LLAMA3}},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}},
    ],
)
def test_rope_formats(fields):
    config = DecoderConfig.from_dict(SIZES | fields)
    assert (config.rope_theta, config.rope_scaling) == (5e5, SCALING)
    written = config.to_dict()
    assert ("rope_parameters" in written) == ("rope_parameters" in fields)
    assert DecoderConfig.from_dict(written) == config


@pytest.mark.parametrize("scaling", [None, RopeScaling("linear", 2.0), SCALING])
def test_transformers_round_trip(scaling, tmp_path):
    config = DecoderConfig(64, 32, 48, 3, 4, 2, 16, rope_theta=777.0, rope_scaling=scaling, tie_word_embeddings=True)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    reference = AutoConfig.from_pretrained(tmp_path)
    assert reference.model_type == "llama"
    assert (reference.num_key_value_heads, reference.head_dim, reference.tie_word_embeddings) == (2, 16, True)
    assert reference.rope_parameters["rope_theta"] == 777.0
    assert reference.rope_parameters["rope_type"] == (scaling.kind if scaling else "default")
    reference.save_pretrained(tmp_path)
    assert DecoderConfig.read(tmp_path) == config


def test_to_dict_keeps_unknown_fields_and_writes_changed_ones():
    config = DecoderConfig.from_dict(SIZES | {"bos_token_id": 5, "rope_theta": 3.0})
    written = dataclasses.replace(config, num_layers=2, rope_theta=9.0).to_dict()
    assert (written["bos_token_id"], written["num_hidden_layers"], written["rope_theta"]) == (5, 2, 9.0)


def test_equality_and_hash_ignore_source():
    assert len({DecoderConfig.from_dict(SIZES), DecoderConfig.from_dict(SIZES | {"bos_token_id": 5})}) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type is 'gpt2'; supported: llama, qwen3"),
        ({"model_type": "qwen3", "use_sliding_window": True}, "the model uses sliding-window attention"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; supported: silu"),
        ({"num_hidden_layers": None}, "field num_hidden_layers is missing"),
        ({"num_hidden_layers": 2.5}, "num_layers is 2.5"),
        ({"quantization_config": {"bits": 4}}, "quantized"),
        ({"num_key_value_heads": 3}, "4 heads cannot share 3 key-value heads"),
        ({"head_dim": 7}, "head_dim is 7"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
            "rope type is 'yarn'; supported: default, linear, llama3",
        ),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "rope type llama3 lacks low_freq_factor"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"num_attention_heads": "4"}, "num_heads is '4'"),
        ({"max_position_embeddings": True}, "max_positions is True"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'; expected true or false"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan; expected a positive number"),
        ({"rope_theta": -1}, "rope_theta is -1; expected a positive number"),
        ({"rope_scaling": [1]}, r"rope_scaling is \[1\]; expected an object"),
        ({"rope_scaling": {"rope_type": "linear", "factor": "2"}}, "factor is '2'; expected a positive number"),
    ],
)
def test_errors_name_file_and_field(change, message):
    with pytest.raises(UserError, match=message) as error:
        DecoderConfig.from_dict(SIZES | change, "somewhere/config.json")
    assert str(error.value).startswith("somewhere/config.json: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"), [(None, "no such file"), ("{", "cannot be read as JSON"), ("[]", "an object")]
)
def test_invalid_config_files(content, message, tmp_path):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=message):
        DecoderConfig.read(tmp_path)
