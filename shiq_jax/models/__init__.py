"""Llama-family decoders in Flax NNX: forward passes, cached decoding, Hugging Face weights in and out."""

from shiq_jax.models.attention import attention
from shiq_jax.models.cache import Cache
from shiq_jax.models.config import DecoderConfig, RopeScaling
from shiq_jax.models.heads import Headed
from shiq_jax.models.huggingface import load_hf, locate, save_hf
from shiq_jax.models.identity import fingerprint
from shiq_jax.models.lora import Lora, is_adapter
from shiq_jax.models.model import Model, init_params
from shiq_jax.models.visibility import Visibility

__all__ = [
    "Cache",
    "DecoderConfig",
    "Headed",
    "Lora",
    "Model",
    "RopeScaling",
    "Visibility",
    "attention",
    "fingerprint",
    "init_params",
    "is_adapter",
    "load_hf",
    "locate",
    "save_hf",
]
