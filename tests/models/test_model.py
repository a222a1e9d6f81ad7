"""Parameter declarations, sharded computation and validation of `Model`."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shiq_jax.models import DecoderConfig, Model, init_params
from shiq_jax.models.ghost_norms import NormTracker
from shiq_jax.sharding import make_mesh, named_sharding

pytestmark = pytest.mark.usefixtures("quick_compilation")

CONFIG = DecoderConfig(64, 32, 48, 2, 4, 2, initializer_range=0.2)
TIED = dataclasses.replace(CONFIG, tie_word_embeddings=True)
ODD = dataclasses.replace(TIED, vocab_size=63)


def relative_error(a, b) -> float:
    a, b = np.asarray(a), np.asarray(b)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def test_parameters_match_their_declarations():
    model = Model.from_config(CONFIG, dtype=jnp.bfloat16)
    params = jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0))
    describe = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)  # noqa: E731
    assert describe(params) == describe(model.abstract_params())
    assert params["layers"]["attention"]["query"]["kernel"].shape == (2, 32, 4, 8)
    assert model.logical_axes()["layers"]["attention"]["query"]["kernel"] == ("layers", "embed", "heads", "head_dim")
    ranks = jax.tree.map(lambda leaf, axes: leaf.ndim == len(axes), params, model.logical_axes())
    assert all(jax.tree.leaves(ranks))


def test_initialization_is_scaled_and_independent_of_mesh():
    model = Model.from_config(CONFIG, mesh=make_mesh("fsdp=4,tensor=2"))
    sharded = init_params(model, jax.random.key(5))
    unsharded = init_params(Model.from_config(CONFIG), jax.random.key(5))
    chex.assert_trees_all_equal(jax.device_get(sharded), jax.device_get(unsharded))
    kernel = unsharded["layers"]["mlp"]["up"]["kernel"]
    np.testing.assert_allclose(np.std(kernel, axis=(1, 2)), CONFIG.initializer_range, rtol=0.1)
    assert not np.array_equal(kernel[0], kernel[1])

    def check(leaf, abstract, axes):
        assert leaf.sharding == abstract.sharding == named_sharding(model.mesh, axes, leaf.shape)

    jax.tree.map(check, sharded, model.abstract_params(), model.logical_axes())
    assert sharded["layers"]["mlp"]["up"]["kernel"].sharding.shard_shape((2, 32, 48)) == (2, 8, 24)


@pytest.mark.parametrize(
    ("config", "mesh"),
    [
        (CONFIG, "fsdp=2,tensor=2"),
        (TIED, "fsdp=8"),
        pytest.param(ODD, "replica=2,fsdp=2,tensor=2", marks=pytest.mark.slow),
        pytest.param(TIED, "replica=2,sequence=2,tensor=2", marks=pytest.mark.slow),
    ],
)
def test_sharded_statistics_and_gradients_match_unsharded(config, mesh, random_params):
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 63, (4, 10)))

    def loss(model):
        def objective(params):
            hidden = model.hidden(params, tokens)
            stats = model.token_stats(params, hidden[:, :-1], tokens[:, 1:], extra=("lse2",))
            return jnp.sum(1.3 * stats.logp + jnp.sin(stats.lse) + stats.lse2), (hidden, stats)

        return jax.jit(jax.value_and_grad(objective, has_aux=True))

    unsharded, sharded = Model.from_config(config), Model.from_config(config, mesh=make_mesh(mesh))
    (expected, expected_outputs), expected_grads = loss(unsharded)(random_params(unsharded))
    params = random_params(sharded)
    (value, outputs), grads = loss(sharded)(params)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    chex.assert_trees_all_close(outputs, expected_outputs, rtol=1e-7, atol=2e-5)
    errors = jax.tree.map(relative_error, grads, expected_grads)
    assert max(jax.tree.leaves(errors)) < 1e-5, errors
    same = jax.tree.map(lambda grad, param: grad.sharding.is_equivalent_to(param.sharding, grad.ndim), grads, params)
    assert all(jax.tree.leaves(same)), same


@pytest.mark.parametrize("shape", [(), (5, 2, 3)])
def test_statistics_of_any_leading_shape(shape, random_params):
    model = Model.from_config(CONFIG, mesh=make_mesh("fsdp=2,sequence=2,tensor=2"))
    params = random_params(model)
    hidden = jax.random.normal(jax.random.key(1), (*shape, 32))
    tokens = jax.random.randint(jax.random.key(2), shape, 0, 64)
    stats = model.token_stats(params, hidden, tokens)
    logits = jax.nn.log_softmax(model.project(params, hidden))
    np.testing.assert_allclose(stats.logp, jnp.take_along_axis(logits, tokens[..., None], -1)[..., 0], atol=1e-5)
    assert stats.logp.shape == stats.lse.shape == shape


def test_statistics_materialize_no_logits_and_few_collectives():
    model = Model.from_config(CONFIG, mesh=make_mesh("fsdp=4,tensor=2"))
    params = model.abstract_params()
    hidden = jax.ShapeDtypeStruct(
        (8, 96, 32), jnp.float32, sharding=named_sharding(model.mesh, ("rows", None, None), (8, 96, 32))
    )
    tokens = jax.ShapeDtypeStruct((8, 96), jnp.int32, sharding=named_sharding(model.mesh, ("rows", None), (8, 96)))

    def loss(params, hidden, tokens):
        stats = model.token_stats(params, hidden, tokens)
        return jnp.sum(stats.logp + stats.lse)

    program = jax.jit(jax.grad(loss)).lower(params, hidden, tokens).compile().as_text()
    # The unembedding is gathered over fsdp once; only statistics and gradients are reduced.
    assert program.count(" all-gather(") == 1
    assert program.count(" all-reduce(") + program.count(" reduce-scatter(") <= 6
    assert "f32[8,96,64]" not in program and "f32[768,64]" not in program


def test_embeddings_stay_sharded_along_rows():
    model = Model.from_config(TIED, mesh=make_mesh("replica=2,fsdp=2,tensor=2"))
    tokens = jax.ShapeDtypeStruct((8, 16), jnp.int32, sharding=named_sharding(model.mesh, ("rows", None), (8, 16)))
    program = jax.jit(model.hidden).lower(model.abstract_params(), tokens).compile().as_text()
    assert "f32[2,16,32]" in program  # the rows of one device
    assert "f32[8,16,32]" not in program and "f32[8,16,16]" not in program


def test_tracking_keeps_values_and_requires_the_same_tokens(random_params):
    model, tokens = Model.from_config(TIED), jnp.zeros((2, 5), jnp.int32)
    params = random_params(model)
    tracking = model.tracking(NormTracker(jnp.zeros(2)), tokens)
    hidden = tracking.hidden(params, tokens)
    np.testing.assert_array_equal(hidden, model.hidden(params, tokens))
    chex.assert_trees_all_equal(tracking.token_stats(params, hidden, tokens), model.token_stats(params, hidden, tokens))
    with pytest.raises(ValueError, match="`tracking` was called with different tokens"):
        tracking.hidden(params, tokens + 1)
    with pytest.raises(ValueError, match="lse2"):
        tracking.token_stats(params, hidden, tokens, extra=("lse2",))


def test_equality_and_hash():
    model = Model.from_config(CONFIG, mesh=make_mesh())
    same = dataclasses.replace(Model.from_config(CONFIG, mesh=make_mesh()), generation_config={"eos_token_id": 2})
    assert model == same and hash(model) == hash(same)
    assert model != dataclasses.replace(model, remat="full")


def test_invalid_settings_raise():
    with pytest.raises(ValueError, match="remat 'some' is unknown; the policies are none, dots, full"):
        Model.from_config(CONFIG, remat="some")
    with pytest.raises(ValueError, match="attention engine 'warp' is unknown"):
        Model.from_config(CONFIG, engine="warp")
