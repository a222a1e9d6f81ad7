"""A tiny decoder in Hugging Face format, generated locally: byte-level tokenizer, Llama configuration, random weights.

It lets every command run without a download. The tokenizer knows all 256 bytes, so any text, any JSON and any chat can
be encoded; the weights are drawn with numpy and written under Hugging Face names, so transformers loads the directory
too.
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
    # A vocabulary that is a multiple of 8 is divisible across devices; every id has a token.
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

    264 tokens: 8 special ones, then the 256 bytes; one token per byte of UTF-8. Plain text is opened by `<bos>`; chats
    are written in the ChatML form, each turn closed by `<|im_end|>`.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *letters))}
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
    """The `config.json` of a tiny Llama decoder over the byte-level vocabulary.

    Raises ValueError when the heads do not divide the width or the key heads do not divide the heads.
    """
    if hidden_size % num_heads or (hidden_size // num_heads) % 2:
        raise ValueError(
            f"hidden_size={hidden_size} must be num_heads={num_heads} times an even head size: change one of the two"
        )
    if num_heads % num_kv_heads:
        raise ValueError(f"num_kv_heads={num_kv_heads} must divide num_heads={num_heads}")
    identifiers = {token: index for index, token in enumerate(SPECIAL_TOKENS)}
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
        "bos_token_id": identifiers["<bos>"],
        "eos_token_id": identifiers["<eos>"],
        "pad_token_id": identifiers["<pad>"],
        "torch_dtype": "float32",
    }


def tiny_directory(path: str | Path, seed: int = 0, **config: int | bool) -> Path:
    """Write a tiny model directory in Hugging Face format and return its path.

    Args:
      path: directory to write; made when missing. Files of the same names in it are replaced.
      seed: of the weights; equal seeds and sizes give equal bytes.
      **config: sizes, as keywords of `tiny_config`.
    """
    _write(Path(path), tiny_config(**config), seed)
    return Path(path)


@hosts.on_writer
def _write(path: Path, settings: dict, seed: int) -> None:
    from safetensors.numpy import save_file

    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    generation = {
        "bos_token_id": settings["bos_token_id"],
        "eos_token_id": [settings["eos_token_id"], SPECIAL_TOKENS.index("<|im_end|>")],
        "pad_token_id": settings["pad_token_id"],
        "do_sample": True,
        "temperature": 1.0,
    }
    (path / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    tiny_tokenizer().save_pretrained(path)
    # The metadata tells transformers which library's layout the tensors follow; it refuses files without it.
    save_file(_weights(settings, np.random.default_rng(seed)), path / "model.safetensors", metadata={"format": "pt"})


def _weights(config: dict, random: np.random.Generator) -> dict[str, np.ndarray]:
    """Random float32 tensors under Hugging Face names, matrices as [out, in], in a fixed order of drawing."""
    hidden, intermediate = config["hidden_size"], config["intermediate_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    # Branches that write to the residual stream start smaller, so that depth does not raise its variance.
    branch = 1.0 / math.sqrt(2 * config["num_hidden_layers"])

    def matrix(rows: int, columns: int, gain: float = 1.0) -> np.ndarray:
        return (random.standard_normal((rows, columns)) * gain / math.sqrt(columns)).astype(np.float32)

    embedding = (random.standard_normal((config["vocab_size"], hidden)) * 0.1).astype(np.float32)
    tensors = {"model.embed_tokens.weight": embedding}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        tensors |= {
            prefix + "input_layernorm.weight": np.ones(hidden, np.float32),
            prefix + "self_attn.q_proj.weight": matrix(queries, hidden),
            prefix + "self_attn.k_proj.weight": matrix(keys, hidden),
            prefix + "self_attn.v_proj.weight": matrix(keys, hidden),
            prefix + "self_attn.o_proj.weight": matrix(hidden, queries, branch),
            prefix + "post_attention_layernorm.weight": np.ones(hidden, np.float32),
            prefix + "mlp.gate_proj.weight": matrix(intermediate, hidden),
            prefix + "mlp.up_proj.weight": matrix(intermediate, hidden),
            prefix + "mlp.down_proj.weight": matrix(hidden, intermediate, branch),
        }
    tensors["model.norm.weight"] = np.ones(hidden, np.float32)
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = matrix(config["vocab_size"], hidden, 0.2)
    return tensors
