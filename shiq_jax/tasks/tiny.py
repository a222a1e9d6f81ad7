"""Generate a tiny randomly initialized Llama in Hugging Face format, so that every command runs without a download.

The tokenizer is byte-level and encodes any text. transformers can load the directory.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np

from shiq_jax.sharding import hosts

SPECIAL_TOKENS = (
    "<pad>",
    "<bos>",
    "<eos>",
    "<|im_start|>",
    "<|im_end|>",
    # Pad the vocabulary to a multiple of 8, so that it can be sharded.
    "<reserved_0>",
    "<reserved_1>",
    "<reserved_2>",
)
VOCABULARY_SIZE = 256 + len(SPECIAL_TOKENS)

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% if tools %}{{ '<|im_start|>system\ntools: ' + (tools | tojson) + '<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tiny_tokenizer():
    """The byte-level tokenizer of the tiny decoder, as a transformers fast tokenizer.

    264 tokens: 8 special tokens and the 256 bytes of UTF-8. Plain text starts with `<bos>`; the chat template is
    ChatML, in which `<|im_end|>` ends each turn.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    byte_tokens = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *byte_tokens))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", vocabulary["<bos>"])]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        additional_special_tokens=list(SPECIAL_TOKENS[3:]),
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )


def tiny_config(
    *,
    hidden_size: int = 128,
    intermediate_size: int = 352,
    num_layers: int = 4,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    max_positions: int = 2048,
    tie_word_embeddings: bool = False,
) -> dict:
    """The `config.json` of a tiny Llama decoder with the byte-level vocabulary.

    Raises:
        ValueError: the sizes are not divisible as the attention heads require.
    """
    if hidden_size % num_heads or (hidden_size // num_heads) % 2:
        raise ValueError(
            f"hidden_size={hidden_size} must be num_heads={num_heads} times an even head size: change one of them"
        )
    if num_heads % num_kv_heads:
        raise ValueError(f"num_kv_heads={num_kv_heads} must divide num_heads={num_heads}")
    token_ids = {token: index for index, token in enumerate(SPECIAL_TOKENS)}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCABULARY_SIZE,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "head_dim": hidden_size // num_heads,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": max_positions,
        "tie_word_embeddings": tie_word_embeddings,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": token_ids["<bos>"],
        "eos_token_id": token_ids["<eos>"],
        "pad_token_id": token_ids["<pad>"],
        "torch_dtype": "float32",
    }


def tiny_directory(path: str | Path, seed: int = 0, **config: int | bool) -> Path:
    """Write a tiny model directory in Hugging Face format and return its path.

    Args:
        path: directory, created if missing; existing files of the same names are replaced.
        seed: random seed of the weights; equal seeds and sizes give identical files.
        **config: arguments of `tiny_config`.
    """
    _write(Path(path), tiny_config(**config), seed)
    return Path(path)


@hosts.on_writer
def _write(path: Path, config: dict, seed: int) -> None:
    from safetensors.numpy import save_file

    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    generation_config = {
        "bos_token_id": config["bos_token_id"],
        "eos_token_id": [config["eos_token_id"], SPECIAL_TOKENS.index("<|im_end|>")],
        "pad_token_id": config["pad_token_id"],
        "do_sample": True,
        "temperature": 1.0,
    }
    (path / "generation_config.json").write_text(json.dumps(generation_config, indent=2) + "\n")
    tiny_tokenizer().save_pretrained(path)
    # transformers rejects safetensors files without this metadata.
    save_file(_weights(config, np.random.default_rng(seed)), path / "model.safetensors", metadata={"format": "pt"})


def _weights(config: dict, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Random float32 tensors by Hugging Face name, matrices as [out, in]; generated in a fixed order."""
    hidden, intermediate = config["hidden_size"], config["intermediate_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    # Scale down the projections into the residual stream, so that its variance does not grow with depth.
    residual_gain = 1.0 / math.sqrt(2 * config["num_hidden_layers"])

    def matrix(rows: int, columns: int, gain: float = 1.0) -> np.ndarray:
        return (rng.standard_normal((rows, columns)) * gain / math.sqrt(columns)).astype(np.float32)

    embedding = (rng.standard_normal((config["vocab_size"], hidden)) * 0.1).astype(np.float32)
    tensors = {"model.embed_tokens.weight": embedding}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        tensors |= {
            prefix + "input_layernorm.weight": np.ones(hidden, np.float32),
            prefix + "self_attn.q_proj.weight": matrix(queries, hidden),
            prefix + "self_attn.k_proj.weight": matrix(keys, hidden),
            prefix + "self_attn.v_proj.weight": matrix(keys, hidden),
            prefix + "self_attn.o_proj.weight": matrix(hidden, queries, residual_gain),
            prefix + "post_attention_layernorm.weight": np.ones(hidden, np.float32),
            prefix + "mlp.gate_proj.weight": matrix(intermediate, hidden),
            prefix + "mlp.up_proj.weight": matrix(intermediate, hidden),
            prefix + "mlp.down_proj.weight": matrix(hidden, intermediate, residual_gain),
        }
    tensors["model.norm.weight"] = np.ones(hidden, np.float32)
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = matrix(config["vocab_size"], hidden, 0.2)
    return tensors
