"""Gradients that are added to sums, against sums of gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shiq_jax.models import DecoderConfig, Model
from shiq_jax.models.accumulation import continuing

pytestmark = pytest.mark.usefixtures("quick_compilation")

SIZES = dict(vocab_size=29, hidden_size=16, intermediate_size=24, num_layers=3, num_heads=4, num_kv_heads=2)


def gradient(model, params, tokens):
    """Of some function of all hidden states."""
    weights = np.random.default_rng(2).normal(size=(*tokens.shape, 16)).astype(np.float32)

    def loss(params):
        return jnp.sum(jnp.sin(model.hidden(params, tokens)) * weights)

    return jax.jit(jax.grad(loss))(params)


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_a_gradient_is_added_to_the_sums(remat, draw):
    model = Model.from_config(DecoderConfig(**SIZES, attention_bias=True), remat=remat)
    params = draw(model)
    tokens = np.random.default_rng(0).integers(29, size=(2, 9))
    plain = gradient(model, params, tokens)
    before = jax.tree.map(lambda leaf: 3 + leaf, params["layers"])
    added = gradient(model.accumulating(before), params, tokens)
    np.testing.assert_allclose(added["norm"]["scale"], plain["norm"]["scale"], rtol=1e-6)
    jax.tree.map(
        lambda found, sums, more: np.testing.assert_allclose(found, sums + more, rtol=1e-5, atol=1e-6),
        added["layers"], before, plain["layers"],
    )  # fmt: skip


def test_only_what_has_sums_has_a_gradient(draw):
    model = Model.from_config(DecoderConfig(**SIZES))
    params = draw(model)
    tokens = np.random.default_rng(0).integers(29, size=(2, 9))
    before = {"mlp": {"up": params["layers"]["mlp"]["up"]}}
    found = gradient(model.accumulating(before), params, tokens)["layers"]
    plain = gradient(model, params, tokens)["layers"]
    wanted = plain["mlp"]["up"]["kernel"] + before["mlp"]["up"]["kernel"]
    np.testing.assert_allclose(found["mlp"]["up"]["kernel"], wanted, rtol=1e-5, atol=1e-6)
    assert not np.any(found["mlp"]["down"]["kernel"]) and np.any(plain["mlp"]["down"]["kernel"])


@pytest.mark.parametrize("own", [True, False])
def test_the_whole_gradient_is_added_to_sums_of_any_model(own, draw):
    model = Model.from_config(DecoderConfig(**SIZES, tie_word_embeddings=True))
    params = draw(model)
    tokens = np.random.default_rng(0).integers(29, size=(2, 9))
    before = jax.tree.map(lambda leaf: 3 + leaf, params)

    def loss(params, before):
        # A foreign model has no `accumulating`, but may have parameters of the same names.
        given, params = (model, params) if before is None else continuing(model if own else object(), params, before)
        return jnp.sum(jnp.sin((given if own else model).hidden(params, tokens)))

    plain, added = (jax.jit(jax.grad(loss))(params, sums) for sums in (None, before))
    jax.tree.map(
        lambda found, sums, more: np.testing.assert_allclose(found, sums + more, rtol=1e-5, atol=1e-5),
        added, before, plain,
    )  # fmt: skip
