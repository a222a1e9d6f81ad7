"""The tracked head on a mesh: same results, and the vocabulary stays sharded."""

import dataclasses

import jax
import numpy as np
import pytest

from shiq_jax.models import ghost_vocabulary
from shiq_jax.privacy import FlatClip, Groupwise, clipped_sum, count_groups
from shiq_jax.sharding import make_mesh, named_sharding

CLIP = FlatClip(0.5)


@pytest.fixture(scope="module")
def compiled_sum(decoder, make_batch, unit_losses):
    """Compile a clipped sum over trajectories; return the program and its arguments."""

    def make(variant, method, mesh=None):
        model, params = decoder(variant)
        batch = make_batch("trajectory")
        if mesh is not None:
            model = dataclasses.replace(model, mesh=make_mesh(mesh))
            shapes = model.abstract_params()
            params = jax.tree.map(lambda leaf, shape: jax.device_put(leaf, shape.sharding), params, shapes)
            batch = jax.tree.map(
                lambda leaf: jax.device_put(
                    leaf, named_sharding(model.mesh, ("rows", *(None,) * (leaf.ndim - 1)), leaf.shape)
                ),
                batch,
            )
        clip = Groupwise(CLIP, count_groups(params)) if method == "group" else CLIP
        losses = unit_losses(model, "trajectory")
        function = jax.jit(lambda params, batch: clipped_sum(losses, params, batch, clip=clip, method=method)[:2])
        return function.lower(params, batch).compile(), (params, batch)

    return make


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["large vocabulary", "untied"])
@pytest.mark.parametrize(("method", "mesh"), [("ghost", "fsdp=2,tensor=4"), ("bk", "replica=2,fsdp=2,tensor=2")])
def test_result_is_independent_of_mesh(method, mesh, variant, compiled_sum, relative_error, monkeypatch):
    monkeypatch.setattr(ghost_vocabulary, "BUDGET", 1000)
    single, args = compiled_sum(variant, method)
    sharded, sharded_args = compiled_sum(variant, method, mesh)
    (total, norms), (sharded_total, sharded_norms) = single(*args), sharded(*sharded_args)
    np.testing.assert_allclose(norms, sharded_norms, rtol=1e-4)
    assert relative_error(sharded_total, total) < 1e-4


def test_groupwise_result_is_independent_of_mesh(compiled_sum, relative_error):
    single, args = compiled_sum("large vocabulary", "group")
    sharded, sharded_args = compiled_sum("large vocabulary", "group", "fsdp=2,tensor=2")
    assert relative_error(sharded(*sharded_args)[0], single(*args)[0]) < 1e-4


@pytest.mark.parametrize("method", ["ghost", "bk"])
def test_head_is_not_gathered(method, compiled_sum, monkeypatch):
    """Features may be all-gathered, but no array on a device spans the vocabulary of 152."""
    # A small budget splits the vocabulary into several chunks, as for a real model.
    monkeypatch.setattr(ghost_vocabulary, "BUDGET", 1000)
    text = compiled_sum("large vocabulary", method, "fsdp=2,tensor=4")[0].as_text()
    assert "[16,38]" in text and ",152]" not in text
