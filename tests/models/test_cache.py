"""Cached decoding against the full forward pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shiq_jax.models import DecoderConfig, Model
from shiq_jax.models.cache import replace_rows, slot_intervals
from shiq_jax.sharding import make_mesh

CONFIG = DecoderConfig(64, 32, 48, 3, 4, 2)


@pytest.fixture(scope="module")
def model():
    return Model.from_config(CONFIG)


@pytest.fixture(scope="module")
def params(model, random_params):
    return random_params(model)


def random_tokens(rows: int, length: int, seed: int = 0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, CONFIG.vocab_size, (rows, length)))


def left_padded(sequences: list[np.ndarray], width: int):
    tokens, valid = np.full((len(sequences), width), 63), np.zeros((len(sequences), width), bool)
    for row, sequence in enumerate(sequences):
        tokens[row, width - len(sequence) :] = sequence
        valid[row, width - len(sequence) :] = True
    return jnp.asarray(tokens), jnp.asarray(valid), jnp.maximum(jnp.cumsum(jnp.asarray(valid), 1) - 1, 0)


@pytest.mark.parametrize("chunks", [(9,), (6, 1, 1, 1)])
def test_chunked_decoding_matches_forward(chunks, model, params):
    tokens = random_tokens(2, 9)
    cache, start, outputs = model.init_cache(2, 12), 0, []
    extend = jax.jit(model.extend)
    for size in chunks:
        positions = jnp.broadcast_to(jnp.arange(start, start + size), (2, size))
        hidden, cache = extend(params, cache, tokens[:, start : start + size], positions, start)
        outputs.append(hidden)
        start += size
    np.testing.assert_allclose(jnp.concatenate(outputs, 1), jax.jit(model.hidden)(params, tokens), atol=1e-5)
    np.testing.assert_array_equal(cache.enter == 0, jnp.arange(12)[None].repeat(2, 0) < 9)


def test_left_padding_is_invisible(model, params):
    lengths, width, new = (3, 7, 1), 7, 4
    sequences = [np.asarray(random_tokens(1, length + new, seed=length))[0] for length in lengths]
    tokens, valid, positions = left_padded([s[:length] for s, length in zip(sequences, lengths, strict=True)], width)
    extend, forward = jax.jit(model.extend), jax.jit(model.hidden)
    hidden, cache = extend(params, model.init_cache(3, width + new), tokens, positions, 0, slot_intervals(valid))
    outputs = [hidden]
    for step in range(new):
        token = jnp.asarray([[s[length + step]] for s, length in zip(sequences, lengths, strict=True)])
        positions = jnp.asarray(lengths)[:, None] + step
        hidden, cache = extend(params, cache, token, positions, jnp.int32(width + step))
        outputs.append(hidden)
    outputs = jnp.concatenate(outputs, 1)
    for row, (sequence, length) in enumerate(zip(sequences, lengths, strict=True)):
        padded = jnp.zeros((1, width + new), jnp.int32).at[0, : len(sequence)].set(sequence)
        expected = forward(params, padded)[0, : len(sequence)]
        np.testing.assert_allclose(outputs[row, width - length :], expected, atol=1e-5)
    assert np.isfinite(outputs).all()


@pytest.mark.parametrize("in_parallel", [True, False])
def test_continuations_of_a_prompt_do_not_see_each_other(in_parallel, model, params):
    prompts, answers = random_tokens(2, 5), random_tokens(6, 3, seed=9).reshape(2, 3, 3)
    valid = jnp.asarray([[True] * 5, [False, False, True, True, True]])
    positions = jnp.maximum(jnp.cumsum(valid, 1) - 1, 0)
    extend = jax.jit(model.extend)
    _, cache = extend(params, model.init_cache(2, 14), prompts, positions, 0, slot_intervals(valid))
    branches, outputs = jnp.arange(3), np.zeros((2, 3, 3, CONFIG.hidden_size))
    lengths, all_valid = valid.sum(1)[:, None], jnp.ones((2, 3), bool)
    if in_parallel:
        for step in range(3):
            positions = jnp.broadcast_to(lengths + step, (2, 3))
            intervals = slot_intervals(all_valid, branches, branches + 1)
            hidden, cache = extend(params, cache, answers[:, :, step], positions, 5 + 3 * step, intervals)
            outputs[:, :, step] = hidden
    else:
        for branch in range(3):
            positions = lengths + jnp.arange(3)
            intervals = slot_intervals(all_valid, branch, branch + 1)
            hidden, cache = extend(params, cache, answers[:, branch], positions, 5 + 3 * branch, intervals)
            outputs[:, branch] = hidden
    forward = jax.jit(model.hidden)
    for row, branch in np.ndindex(2, 3):
        sequence = jnp.concatenate([prompts[row][valid[row]], answers[row, branch]])
        np.testing.assert_allclose(outputs[row, branch], forward(params, sequence[None])[0, -3:], atol=1e-5)


@pytest.mark.parametrize("mesh", [None, "fsdp=2,tensor=2"])
def test_branches_match_forward(mesh, model, params):
    """Three branches of two rows wrap around a ring of four slots twice; a branch restarts after four tokens."""
    if mesh is not None:
        model = Model.from_config(CONFIG, mesh=make_mesh(mesh))
        params = jax.device_put(params, jax.tree.map(lambda leaf: leaf.sharding, model.abstract_params()))
    answers = np.asarray(random_tokens(2 * 3 * 9, 1, seed=9)).reshape(2, 3, 9)
    first_steps = np.array([[0, 2, 1], [0, 1, 3]])  # outputs of earlier steps are not checked
    prompts, width = [np.asarray(random_tokens(1, length, seed=length))[0] for length in (6, 3)], 6
    tokens, valid, positions = left_padded(prompts, width)
    _, cache = jax.jit(model.extend)(params, model.init_cache(2, width), tokens, positions, 0, slot_intervals(valid))
    branches, extend_branches, outputs = model.init_branches(2, 3, 4), jax.jit(model.extend_branches), {}
    starts = first_steps.copy()
    for step in range(9):
        starts = np.where(step - starts == 4, step, starts)
        count = np.maximum(step - starts + 1, 0)
        positions = np.asarray([6, 3])[:, None] + count - 1
        hidden, branches = extend_branches(
            params, cache, branches, answers[:, :, step], positions, count, jnp.int32(step % 4)
        )
        outputs |= {(row, branch, step): (starts[row, branch], hidden[row, branch]) for row, branch in np.ndindex(2, 3)}
    forward = jax.jit(Model.from_config(CONFIG).hidden)
    unsharded = jax.device_get(params)
    checked = 0
    for (row, branch, step), (start, hidden) in outputs.items():
        if step >= start:
            padded = np.zeros((1, width + 4), np.int32)
            sequence = np.concatenate([prompts[row], answers[row, branch, start : step + 1]])
            padded[0, : len(sequence)] = sequence
            expected = forward(unsharded, jnp.asarray(padded))[0, len(sequence) - 1]
            np.testing.assert_allclose(hidden, expected, atol=1e-5)
            checked += 1
    assert checked == 6 * 9 - first_steps.sum()


def test_replace_rows(model, params):
    extend = jax.jit(model.extend)

    def prefill(sequences, width):
        tokens, valid, positions = left_padded([np.asarray(sequence) for sequence in sequences], width)
        cache = model.init_cache(len(sequences), width)
        return extend(params, cache, tokens, positions, 0, slot_intervals(valid))[1]

    old = [np.asarray(random_tokens(1, length, seed=length))[0] for length in (7, 2, 5, 7)]
    new = [np.asarray(random_tokens(1, length, seed=20 + length))[0] for length in (4, 3)]
    replaced = jax.jit(replace_rows)(prefill(old, 7), jnp.array([2, 0, 2]), prefill([*new, new[0]], 4))
    expected = prefill([new[1], old[1], new[0], old[3]], 7)
    visible = np.asarray(expected.enter == 0)
    np.testing.assert_array_equal(replaced.enter == 0, visible)
    np.testing.assert_array_equal(replaced.exit[visible], expected.exit[visible])
    for field, slot_axis in (("keys", -1), ("values", -2)):
        actual, expected_entries = (
            np.moveaxis(np.asarray(getattr(cache, field)), slot_axis, 2)[:, visible] for cache in (replaced, expected)
        )
        np.testing.assert_allclose(actual, expected_entries, atol=1e-5)


def test_sharded_cache_matches_forward(model, params):
    mesh = make_mesh("fsdp=2,tensor=2")
    sharded = Model.from_config(CONFIG, mesh=mesh)
    tokens = random_tokens(4, 6)
    positions = jnp.broadcast_to(jnp.arange(6), (4, 6))
    cache = sharded.init_cache(4, 8)
    assert cache.keys.sharding.shard_shape(cache.keys.shape) == (3, 2, 1, 8, 8)
    placed = jax.device_put(params, jax.tree.map(lambda leaf: leaf.sharding, sharded.abstract_params()))
    hidden, cache = jax.jit(sharded.extend)(placed, cache, tokens, positions, 0)
    assert cache.keys.sharding.shard_shape(cache.keys.shape) == (3, 2, 1, 8, 8)
    np.testing.assert_allclose(hidden, jax.jit(model.hidden)(params, tokens), atol=1e-5)


def test_tokens_beyond_the_cache_raise(model, params):
    tokens = random_tokens(1, 3)
    with pytest.raises(ValueError, match="3 tokens starting at slot 2 do not fit into a cache of 4 slots"):
        model.extend(params, model.init_cache(1, 4), tokens, jnp.arange(3)[None], 2)
