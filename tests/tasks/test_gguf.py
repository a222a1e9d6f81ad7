"""GGUF conversion: a file in llama.cpp's layout converts back to the original model."""

import numpy as np
import pytest

from shiq_jax.errors import UserError
from shiq_jax.tasks.gguf import gguf_to_huggingface
from shiq_jax.tasks.tiny import tiny_directory, tiny_tokenizer

HEADS, KV_HEADS = 4, 2
GGUF_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def _interleave_rotary(weight, heads):
    """The permutation of convert_hf_to_gguf.py in llama.cpp (LlamaModel.permute)."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
    )


def _write(path, tensors, tokenizer, architecture="llama"):
    import gguf

    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(48)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    # Two tokens that are results of merges: one of digits, one of letters.
    merged = {"<reserved_0>": "12", "<reserved_1>": "ab"}
    tokens = [merged.get(token, token) for token in tokenizer.convert_ids_to_tokens(range(len(tokenizer)))]
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in tokenizer.all_special_tokens else 1 for token in tokens])
    writer.add_token_merges(["1 2", "a b"])
    for name, role in (("bos", "bos"), ("eos", "eos"), ("unk", "pad"), ("pad", "pad")):
        getattr(writer, f"add_{name}_token_id")(getattr(tokenizer, f"{role}_token_id"))
    writer.add_chat_template(tokenizer.chat_template)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _to_gguf(tensors):
    """Tensors with GGUF names, and interleaved queries and keys."""
    renamed = {}
    for name, tensor in tensors.items():
        stem = name.removesuffix(".weight")
        if stem.startswith("model.layers."):
            _, _, layer, part = stem.split(".", 3)
            heads = {"self_attn.q_proj": HEADS, "self_attn.k_proj": KV_HEADS}.get(part)
            tensor = _interleave_rotary(tensor, heads) if heads else tensor
            renamed[f"blk.{layer}.{GGUF_NAMES[part]}.weight"] = tensor
        else:
            name = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}[stem]
            renamed[f"{name}.weight"] = tensor
    return renamed


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    from safetensors.numpy import load_file

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_layers": 2, "num_heads": HEADS, "num_kv_heads": KV_HEADS}
    path = tiny_directory(tmp_path_factory.mktemp("original"), seed=1, max_positions=64, **sizes)
    return load_file(path / "model.safetensors")


@pytest.mark.parametrize("tied", [False, True])
def test_round_trip_is_bitwise(original, tmp_path, tied):
    from safetensors.numpy import load_file
    from transformers import AutoConfig, AutoModelForCausalLM

    tensors = {name: tensor for name, tensor in original.items() if not (tied and name == "lm_head.weight")}
    file = _write(
        tmp_path / "model.gguf", _to_gguf(tensors) | {"rope_freqs.weight": np.ones(4, np.float32)}, tiny_tokenizer()
    )
    (tmp_path / "out").mkdir()
    gguf_to_huggingface(file, tmp_path / "out")
    converted = load_file(tmp_path / "out" / "model.safetensors")
    assert converted.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(converted[name], tensor, err_msg=name)
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert (config.tie_word_embeddings, config.rms_norm_eps) == (tied, 1e-5)
    _, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]


def test_tokenizer_splits_digits_and_has_control_tokens(original, tmp_path):
    from transformers import AutoTokenizer

    reference = tiny_tokenizer()
    (tmp_path / "out").mkdir()
    gguf_to_huggingface(_write(tmp_path / "model.gguf", _to_gguf(original), reference), tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    # "1 2" is also a merge, but the pre-tokenizer splits digits first.
    assert tokenizer.tokenize("ab12") == ["ab", "1", "2"]
    assert tokenizer("<|im_end|>").input_ids == [reference.convert_tokens_to_ids("<|im_end|>")]
    assert tokenizer.decode(tokenizer("x <|im_end|>\n").input_ids) == "x <|im_end|>\n"
    assert tokenizer.eos_token == "<eos>" and tokenizer.chat_template == reference.chat_template


def test_unsupported_files_are_rejected(original, tmp_path):
    file = _write(tmp_path / "other.gguf", {}, tiny_tokenizer(), architecture="gemma")
    with pytest.raises(UserError, match="gemma"):
        gguf_to_huggingface(file, tmp_path)
    file = _write(tmp_path / "odd.gguf", {"blk.0.router.weight": np.ones((2, 2), np.float32)}, tiny_tokenizer())
    with pytest.raises(UserError, match="blk.0.router.weight"):
        gguf_to_huggingface(file, tmp_path)
