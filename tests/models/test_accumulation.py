"""In-place gradient accumulation against sums of separate gradients."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shiq_jax.models import DecoderConfig, Model
from shiq_jax.models.accumulation import accumulate_into

pytestmark = pytest.mark.usefixtures("quick_compilation")

SIZES = dict(vocab_size=29, hidden_size=16, intermediate_size=24, num_layers=3, num_heads=4, num_kv_heads=2)


def gradient(model, params, tokens):
    """Gradient of a nonlinear function of all hidden states."""
    weights = np.random.default_rng(2).normal(size=(*tokens.shape, 16)).astype(np.float32)

    def loss(params):
        return jnp.sum(jnp.sin(model.hidden(params, tokens)) * weights)

    return jax.jit(jax.grad(loss))(params)


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_layer_gradients_are_added_to_sums(remat, random_params):
    model = Model.from_config(DecoderConfig(**SIZES, attention_bias=True), remat=remat)
    params = random_params(model)
    tokens = np.random.default_rng(0).integers(29, size=(2, 9))
    grads = gradient(model, params, tokens)
    sums = jax.tree.map(lambda leaf: 3 + leaf, params["layers"])
    accumulated = gradient(model.accumulating(sums), params, tokens)
    np.testing.assert_allclose(accumulated["norm"]["scale"], grads["norm"]["scale"], rtol=1e-6)
    expected = jax.tree.map(jnp.add, sums, grads["layers"])
    chex.assert_trees_all_close(accumulated["layers"], expected, rtol=1e-5, atol=1e-6)


def test_parameters_without_sums_get_zero_gradients(random_params):
    model = Model.from_config(DecoderConfig(**SIZES))
    params = random_params(model)
    tokens = np.random.default_rng(0).integers(29, size=(2, 9))
    sums = {"mlp": {"up": params["layers"]["mlp"]["up"]}}
    accumulated = gradient(model.accumulating(sums), params, tokens)["layers"]
    grads = gradient(model, params, tokens)["layers"]
    expected = grads["mlp"]["up"]["kernel"] + sums["mlp"]["up"]["kernel"]
    np.testing.assert_allclose(accumulated["mlp"]["up"]["kernel"], expected, rtol=1e-5, atol=1e-6)
    assert not np.any(accumulated["mlp"]["down"]["kernel"]) and np.any(grads["mlp"]["down"]["kernel"])


@pytest.mark.parametrize("in_place", [True, False])
def test_all_gradients_are_added_to_sums(in_place, random_params):
    model = Model.from_config(DecoderConfig(**SIZES, tie_word_embeddings=True))
    params = random_params(model)
    tokens = np.random.default_rng(0).integers(29, size=(2, 9))
    sums = jax.tree.map(lambda leaf: 3 + leaf, params)

    def loss(params, sums):
        accumulating = model
        if sums is not None and in_place:
            accumulating, params = accumulate_into(model, params, sums)
        elif sums is not None:
            # An external model has no `accumulating`, but may have parameters with the same names.
            _, params = accumulate_into(object(), params, sums)
        return jnp.sum(jnp.sin(accumulating.hidden(params, tokens)))

    gradient = jax.jit(jax.grad(loss))
    expected = jax.tree.map(jnp.add, sums, gradient(params, None))
    chex.assert_trees_all_close(gradient(params, sums), expected, rtol=1e-5, atol=1e-5)
