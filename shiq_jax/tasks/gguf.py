"""Convert a GGUF file of a Llama decoder to a Hugging Face directory, without torch.

llama.cpp interleaves the rotary pairs of each head in the query and key matrices, and stores the vocabulary, merges and
chat template in the file's metadata. The converted directory equals the one that transformers writes.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from shiq_jax.errors import UserError
from shiq_jax.progress import track

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# GGUF token type of control tokens.
_CONTROL = 3


def gguf_to_huggingface(file: Path, directory: Path) -> None:
    """Convert a GGUF Llama decoder: write its config, float32 weights, tokenizer and generation config.

    Args:
        file: a GGUF file of architecture "llama" with a byte-level BPE tokenizer.
        directory: an existing directory.

    Raises:
        UserError: the package `gguf` is missing, or the file has another architecture or tokenizer.
    """
    try:
        import gguf
    except ImportError as error:
        raise UserError("reading GGUF weights needs the package gguf: pip install 'shiq_jax[fetch]'") from error
    from safetensors.numpy import save_file

    reader = gguf.GGUFReader(str(file))
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    architecture, tokenizer_type = metadata.get("general.architecture"), metadata.get("tokenizer.ggml.model")
    if (architecture, tokenizer_type) != ("llama", "gpt2"):
        raise UserError(
            f"{file} has architecture {architecture!r} and tokenizer {tokenizer_type!r}: expected 'llama' and 'gpt2'"
        )
    tensors = {}
    for tensor in track(reader.tensors, "dequantizing", len(reader.tensors), "tensors"):
        name, is_parameter = _huggingface_name(tensor.name)
        if not is_parameter:
            continue
        array = np.ascontiguousarray(gguf.quants.dequantize(tensor.data, tensor.tensor_type), np.float32)
        if name.endswith("q_proj.weight"):
            array = _deinterleave_rotary(array, metadata["llama.attention.head_count"])
        elif name.endswith("k_proj.weight"):
            array = _deinterleave_rotary(array, metadata["llama.attention.head_count_kv"])
        tensors[name] = array
    config = _config(metadata, tied="lm_head.weight" not in tensors)
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    generation_config = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    (directory / "generation_config.json").write_text(json.dumps(generation_config, indent=2) + "\n")
    _tokenizer(metadata).save_pretrained(directory)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def _huggingface_name(name: str) -> tuple[str, bool]:
    """The Hugging Face name of a GGUF tensor, and whether it is a parameter (`rope_freqs` is not)."""
    stem, _, suffix = name.rpartition(".")
    prefix = ""
    if stem.startswith("blk."):
        _, layer, stem = stem.split(".", 2)
        prefix = f"model.layers.{layer}."
    if stem == "rope_freqs":
        return name, False
    if stem not in _NAMES:
        raise UserError(f"the GGUF tensor {name} is not a Llama parameter: expected one of {', '.join(sorted(_NAMES))}")
    return f"{prefix}{_NAMES[stem]}.{suffix}", True


def _deinterleave_rotary(weight: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's interleaving of rotary pairs in the rows of a query or key matrix [heads * head_dim, in]."""
    pairs = weight.reshape(heads, weight.shape[0] // heads // 2, 2, weight.shape[1])
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(weight.shape))


def _config(metadata: dict, *, tied: bool) -> dict:
    hidden, heads = metadata["llama.embedding_length"], metadata["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
        "hidden_size": hidden,
        "intermediate_size": metadata["llama.feed_forward_length"],
        "num_hidden_layers": metadata["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": metadata["llama.attention.head_count_kv"],
        "head_dim": hidden // heads,
        "hidden_act": "silu",
        # The file stores a float32; its shortest decimal representation is the original number.
        "rms_norm_eps": float(str(np.float32(metadata["llama.attention.layer_norm_rms_epsilon"]))),
        "rope_theta": float(metadata["llama.rope.freq_base"]),
        "max_position_embeddings": metadata["llama.context_length"],
        "tie_word_embeddings": tied,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
        "pad_token_id": metadata["tokenizer.ggml.padding_token_id"],
        "torch_dtype": "float32",
    }


def _tokenizer(metadata: dict):
    """The fast tokenizer that the metadata describes; SmolLM's pre-tokenizer splits digits individually."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if metadata.get("tokenizer.ggml.pre") == "smollm":
        byte_level = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    tokenizer.pre_tokenizer = byte_level
    tokenizer.decoder = decoders.ByteLevel()
    token_types = metadata["tokenizer.ggml.token_type"]
    control = [token for token, token_type in zip(tokens, token_types, strict=True) if token_type == _CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    special_tokens = {
        role: tokens[metadata[f"tokenizer.ggml.{key}_token_id"]]
        for role, key in (
            ("bos_token", "bos"),
            ("eos_token", "eos"),
            ("unk_token", "unknown"),
            ("pad_token", "padding"),
        )
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **special_tokens,
        chat_template=metadata["tokenizer.chat_template"],
        clean_up_tokenization_spaces=False,
        model_max_length=metadata["llama.context_length"],
    )
