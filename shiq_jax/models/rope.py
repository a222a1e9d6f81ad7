"""Rotary position embeddings (Su et al., 2021, RoFormer, section 3.2.2).

Layout of Llama checkpoints: feature i is paired with feature i + head_dim / 2.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from shiq_jax.models.config import DecoderConfig, RopeScaling


def frequencies(config: DecoderConfig) -> np.ndarray:
    """Scaled rotary frequencies in radians per position, float32[head_dim / 2]."""
    unscaled = config.rope_theta ** (-np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim)
    return _scale(unscaled, config.rope_scaling).astype(np.float32)


def _scale(frequencies: np.ndarray, scaling: RopeScaling | None) -> np.ndarray:
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    # Llama 3 interpolates by the number of periods that fit into the original context length.
    periods = scaling.original_max_positions * frequencies / (2 * np.pi)
    keep = np.clip((periods - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor), 0, 1)
    return keep * frequencies + (1 - keep) * frequencies / scaling.factor


def rotation(positions: Int[Array, "*rows length"], frequencies: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of the rotation angles, each float32[*rows, length, 1, head_dim / 2], broadcast over heads."""
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Float[Array, "*rows length heads head_dim"], cosine: jax.Array, sine: jax.Array):
    """Rotate each feature pair of `x` by its angle, in float32; the result has the dtype of `x`."""
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate((first * cosine - second * sine, second * cosine + first * sine), axis=-1).astype(x.dtype)
