"""Llama-family decoders in Flax NNX: forward passes, cached decoding, Hugging Face weights in and out."""

from shiq_jax.models.attention import attention
from shiq_jax.models.attention_mask import AttentionMask
from shiq_jax.models.cache import Cache
from shiq_jax.models.config import DecoderConfig, RopeScaling
from shiq_jax.models.heads import ModelWithHeads
from shiq_jax.models.huggingface import load_hf, locate, save_hf
from shiq_jax.models.lora import Lora, is_adapter
from shiq_jax.models.model import Model, init_params
from shiq_jax.models.weights_fingerprint import fingerprint

__all__ = [
    "AttentionMask",
    "Cache",
    "DecoderConfig",
    "Lora",
    "Model",
    "ModelWithHeads",
    "RopeScaling",
    "attention",
    "fingerprint",
    "init_params",
    "is_adapter",
    "load_hf",
    "locate",
    "save_hf",
]
