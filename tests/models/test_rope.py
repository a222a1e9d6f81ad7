"""Rotary embeddings: frequencies against transformers, and invariance of dot products to shifts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from shiq_jax.models import DecoderConfig, RopeScaling, rope


@pytest.mark.parametrize(
    "scaling",
    [
        RopeScaling("linear", 4.0),
        RopeScaling("llama3", 8.0, 1.0, 4.0, 8192),
        RopeScaling("llama3", 32.0, 2.0, 5.0, 512),
    ],
)
def test_frequencies_match_transformers(scaling):
    config = DecoderConfig(64, 256, 48, 3, 2, head_dim=128, rope_theta=5e5, rope_scaling=scaling)
    raw = config.to_dict()
    raw.pop("model_type")
    expected, attention_scale = ROPE_INIT_FUNCTIONS[scaling.kind](LlamaConfig(**raw), device="cpu")
    np.testing.assert_allclose(rope.frequencies(config), expected.numpy(), rtol=1e-6)
    assert attention_scale == 1.0


def test_llama3_scales_only_low_frequencies():
    unscaled = rope.frequencies(DecoderConfig(64, 256, 48, 3, 2, rope_theta=5e5))
    scaled = rope.frequencies(
        DecoderConfig(64, 256, 48, 3, 2, rope_theta=5e5, rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 8192))
    )
    wavelength = 2 * np.pi / unscaled
    np.testing.assert_array_equal(scaled[wavelength < 8192 / 4], unscaled[wavelength < 8192 / 4])
    np.testing.assert_allclose(scaled[wavelength > 8192], unscaled[wavelength > 8192] / 8, rtol=1e-6)
    assert np.all(np.diff(scaled) < 0)


def test_dot_products_depend_on_the_distance_only():
    config = DecoderConfig(64, 64, 48, 1, 1)
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 64))

    def dot(query_position: int, key_position: int):
        cosine, sine = rope.rotation(jnp.array([query_position, key_position]), rope.frequencies(config))
        rotated_q, rotated_k = rope.rotate(jnp.stack([q[0], k[0]]), cosine, sine)
        return float(jnp.vdot(rotated_q, rotated_k))

    assert dot(7, 3) == pytest.approx(dot(107, 103), abs=1e-4)
    assert dot(0, 0) == pytest.approx(float(jnp.vdot(q, k)), abs=1e-5)
    assert abs(dot(7, 3) - dot(8, 3)) > 1e-3


def test_rotation_preserves_norm_and_dtype():
    config = DecoderConfig(64, 64, 48, 1, 2)
    x = jax.random.normal(jax.random.key(0), (3, 5, 2, 32), jnp.bfloat16)
    out = rope.rotate(x, *rope.rotation(jnp.arange(15).reshape(3, 5), rope.frequencies(config)))
    assert out.dtype == jnp.bfloat16
    norm = lambda y: np.linalg.norm(np.asarray(y, np.float32), axis=-1)  # noqa: E731
    np.testing.assert_allclose(norm(out), norm(x), rtol=1e-2)
