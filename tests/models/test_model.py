"""The description of a model: what it declares, what it refuses, and what a mesh must not change."""

import dataclasses

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


def relative(a, b) -> float:
    a, b = np.asarray(a), np.asarray(b)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def test_parameters_are_what_is_declared():
    model = Model.from_config(CONFIG, dtype=jnp.bfloat16)
    params = jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0))
    describe = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)  # noqa: E731
    assert describe(params) == describe(model.abstract_params())
    assert params["layers"]["attention"]["query"]["kernel"].shape == (2, 32, 4, 8)
    assert model.logical_axes()["layers"]["attention"]["query"]["kernel"] == ("layers", "embed", "heads", "head_dim")
    ranks = jax.tree.map(lambda leaf, axes: leaf.ndim == len(axes), params, model.logical_axes())
    assert all(jax.tree.leaves(ranks))


def test_initial_numbers_have_the_configured_scale_on_every_mesh():
    model = Model.from_config(CONFIG, mesh=make_mesh("fsdp=4,tensor=2"))
    sharded = init_params(model, jax.random.key(5))
    plain = init_params(Model.from_config(CONFIG), jax.random.key(5))
    jax.tree.map(np.testing.assert_array_equal, sharded, plain)
    kernel = plain["layers"]["mlp"]["up"]["kernel"]
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
def test_a_mesh_changes_neither_statistics_nor_gradients(config, mesh, draw):
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 63, (4, 10)))

    def loss(model):
        def run(params):
            hidden = model.hidden(params, tokens)
            stats = model.token_stats(params, hidden[:, :-1], tokens[:, 1:], extra=("lse2",))
            return jnp.sum(1.3 * stats.logp + jnp.sin(stats.lse) + stats.lse2), (hidden, stats)

        return jax.jit(jax.value_and_grad(run, has_aux=True))

    plain, sharded = Model.from_config(config), Model.from_config(config, mesh=make_mesh(mesh))
    (expected, expected_outputs), expected_grads = loss(plain)(draw(plain))
    params = draw(sharded)
    (value, outputs), grads = loss(sharded)(params)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), outputs, expected_outputs)
    errors = jax.tree.map(relative, grads, expected_grads)
    assert max(jax.tree.leaves(errors)) < 1e-5, errors
    placed = jax.tree.map(lambda grad, param: grad.sharding.is_equivalent_to(param.sharding, grad.ndim), grads, params)
    assert all(jax.tree.leaves(placed)), placed


@pytest.mark.parametrize("shape", [(), (5, 2, 3)])
def test_statistics_of_any_leading_shape(shape, draw):
    model = Model.from_config(CONFIG, mesh=make_mesh("fsdp=2,sequence=2,tensor=2"))
    params = draw(model)
    hidden = jax.random.normal(jax.random.key(1), (*shape, 32))
    tokens = jax.random.randint(jax.random.key(2), shape, 0, 64)
    stats = model.token_stats(params, hidden, tokens)
    logits = jax.nn.log_softmax(model.project(params, hidden))
    np.testing.assert_allclose(stats.logp, jnp.take_along_axis(logits, tokens[..., None], -1)[..., 0], atol=1e-5)
    assert stats.logp.shape == stats.lse.shape == shape


def test_no_logits_and_no_collective_in_the_loop():
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
    # One gather of the matrix over fsdp; the statistics are the only thing summed over the vocabulary's devices.
    assert program.count(" all-gather(") == 1
    assert program.count(" all-reduce(") + program.count(" reduce-scatter(") <= 6
    assert "f32[8,96,64]" not in program and "f32[768,64]" not in program


def test_the_embedding_is_not_replicated_on_the_way():
    model = Model.from_config(TIED, mesh=make_mesh("replica=2,fsdp=2,tensor=2"))
    tokens = jax.ShapeDtypeStruct((8, 16), jnp.int32, sharding=named_sharding(model.mesh, ("rows", None), (8, 16)))
    program = jax.jit(model.hidden).lower(model.abstract_params(), tokens).compile().as_text()
    assert "f32[2,16,32]" in program  # a device's own rows
    assert "f32[8,16,32]" not in program and "f32[8,16,16]" not in program


def test_a_model_that_tracks_norms_belongs_to_one_pass(draw):
    plain, tokens = Model.from_config(TIED), jnp.zeros((2, 5), jnp.int32)
    params = draw(plain)
    model = plain.tracking(NormTracker(jnp.zeros(2)), tokens)
    hidden = model.hidden(params, tokens)
    np.testing.assert_array_equal(hidden, plain.hidden(params, tokens))
    jax.tree.map(
        np.testing.assert_array_equal,
        model.token_stats(params, hidden, tokens), plain.token_stats(params, hidden, tokens),
    )  # fmt: skip
    with pytest.raises(ValueError, match="a pass over other tokens"):
        model.hidden(params, tokens + 1)
    with pytest.raises(ValueError, match="lse2"):
        model.token_stats(params, hidden, tokens, extra=("lse2",))


def test_models_are_keys():
    model = Model.from_config(CONFIG, mesh=make_mesh())
    same = dataclasses.replace(Model.from_config(CONFIG, mesh=make_mesh()), generation_config={"eos_token_id": 2})
    assert model == same and hash(model) == hash(same)
    assert model != dataclasses.replace(model, remat="full")


def test_refusals():
    with pytest.raises(ValueError, match="remat 'some' is unknown; the policies are none, dots, full"):
        Model.from_config(CONFIG, remat="some")
    with pytest.raises(ValueError, match="attention engine 'warp' is unknown"):
        Model.from_config(CONFIG, engine="warp")
