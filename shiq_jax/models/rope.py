"""Rotary positions: each pair of a head's features turns by an angle proportional to the token's position.

RoFormer (Su et al., 2021, section 3.2.2), in the layout of Llama checkpoints: feature i is paired with feature i +
head_dim / 2.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from shiq_jax.models.config import DecoderConfig, RopeScaling


def frequencies(config: DecoderConfig) -> np.ndarray:
    """Radians per position of every feature pair, float32[head_dim / 2], after the configured scaling."""
    plain = config.rope_theta ** (-np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim)
    return _scaled(plain, config.rope_scaling).astype(np.float32)


def _scaled(plain: np.ndarray, scaling: RopeScaling | None) -> np.ndarray:
    if scaling is None:
        return plain
    if scaling.kind == "linear":
        return plain / scaling.factor
    # Llama 3: how many turns a pair makes over the original context decides how much of it is stretched.
    turns = scaling.original_max_positions * plain / (2 * np.pi)
    kept = np.clip((turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor), 0, 1)
    return kept * plain + (1 - kept) * plain / scaling.factor


def rotation(positions: Int[Array, "*rows length"], frequencies: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of every angle, two of float32[*rows, length, 1, head_dim / 2] (the 1 stands for the heads)."""
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Float[Array, "*rows length heads head_dim"], cosine: jax.Array, sine: jax.Array):
    """`x` with each feature pair turned by its angle; computed in float32, returned in the dtype of `x`."""
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate((first * cosine - second * sine, second * cosine + first * sine), axis=-1).astype(x.dtype)
