"""The tracked head on a mesh: its numbers, and that the vocabulary stays cut."""

import dataclasses

import jax
import numpy as np
import pytest

from shiq_jax.models import ghost_vocabulary
from shiq_jax.privacy import FlatClip, Groupwise, clipped_sum, count_groups
from shiq_jax.sharding import make_mesh, named_sharding

CLIP = FlatClip(0.5)


@pytest.fixture(scope="module")
def program(decoder, batch_of, example_losses):
    """`program(variant, method, mesh) -> (compiled clipped sum, its arguments)`, on trajectories."""

    def make(variant, method, mesh=None):
        model, params = decoder(variant)
        batch = batch_of("trajectory")
        if mesh is not None:
            model = dataclasses.replace(model, mesh=make_mesh(mesh))
            shapes = model.abstract_params()
            params = jax.tree.map(lambda leaf, like: jax.device_put(leaf, like.sharding), params, shapes)
            batch = jax.tree.map(
                lambda leaf: jax.device_put(
                    leaf, named_sharding(model.mesh, ("rows", *(None,) * (leaf.ndim - 1)), leaf.shape)
                ),
                batch,
            )
        clip = Groupwise(CLIP, count_groups(params)) if method == "group" else CLIP
        losses = example_losses(model, "trajectory")
        summed = jax.jit(lambda params, batch: clipped_sum(losses, params, batch, clip=clip, method=method)[:2])
        return summed.lower(params, batch).compile(), (params, batch)

    return make


@pytest.mark.parametrize("variant", ["many words", "untied"])
@pytest.mark.parametrize(("method", "mesh"), [("ghost", "fsdp=2,tensor=4"), ("bk", "replica=2,fsdp=2,tensor=2")])
def test_devices_change_nothing(method, mesh, variant, program, relative, monkeypatch):
    monkeypatch.setattr(ghost_vocabulary, "BUDGET", 1000)
    alone, given = program(variant, method)
    cut, placed = program(variant, method, mesh)
    (total, norms), (found, cut_norms) = alone(*given), cut(*placed)
    np.testing.assert_allclose(norms, cut_norms, rtol=1e-4)
    assert relative(found, total) < 1e-4


def test_groups_change_nothing_either(program, relative):
    alone, given = program("many words", "group")
    cut, placed = program("many words", "group", "fsdp=2,tensor=2")
    assert relative(cut(*placed)[0], alone(*given)[0]) < 1e-4


@pytest.mark.parametrize("method", ["ghost", "bk"])
def test_no_device_has_the_whole_head(method, program, monkeypatch):
    """Features are gathered, words are not: nothing on a device has a column for each of the 152."""
    # Several parts of the vocabulary, as a real one has.
    monkeypatch.setattr(ghost_vocabulary, "BUDGET", 1000)
    text = program("many words", method, "fsdp=2,tensor=4")[0].as_text()
    assert "[16,38]" in text and ",152]" not in text
