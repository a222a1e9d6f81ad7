"""Decoding with a cache is the full forward pass, one piece at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shiq_jax.models import DecoderConfig, Model
from shiq_jax.models.cache import intervals_of, put
from shiq_jax.sharding import make_mesh

CONFIG = DecoderConfig(64, 32, 48, 3, 4, 2)


@pytest.fixture(scope="module")
def model():
    return Model.from_config(CONFIG)


@pytest.fixture(scope="module")
def params(model, draw):
    return draw(model)


def tokens_of(rows: int, length: int, seed: int = 0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, CONFIG.vocab_size, (rows, length)))


def left_padded(sequences: list[np.ndarray], width: int):
    tokens, valid = np.full((len(sequences), width), 63), np.zeros((len(sequences), width), bool)
    for row, sequence in enumerate(sequences):
        tokens[row, width - len(sequence) :] = sequence
        valid[row, width - len(sequence) :] = True
    return jnp.asarray(tokens), jnp.asarray(valid), jnp.maximum(jnp.cumsum(jnp.asarray(valid), 1) - 1, 0)


@pytest.mark.parametrize("pieces", [(9,), (6, 1, 1, 1)])
def test_pieces_equal_the_whole(pieces, model, params):
    tokens = tokens_of(2, 9)
    cache, start, parts = model.init_cache(2, 12), 0, []
    extend = jax.jit(model.extend)
    for size in pieces:
        where = jnp.broadcast_to(jnp.arange(start, start + size), (2, size))
        hidden, cache = extend(params, cache, tokens[:, start : start + size], where, start)
        parts.append(hidden)
        start += size
    np.testing.assert_allclose(jnp.concatenate(parts, 1), jax.jit(model.hidden)(params, tokens), atol=1e-5)
    np.testing.assert_array_equal(cache.enter == 0, jnp.arange(12)[None].repeat(2, 0) < 9)


def test_left_padding_is_never_seen(model, params):
    lengths, width, new = (3, 7, 1), 7, 4
    sequences = [np.asarray(tokens_of(1, length + new, seed=length))[0] for length in lengths]
    tokens, valid, positions = left_padded([s[:length] for s, length in zip(sequences, lengths, strict=True)], width)
    extend, whole = jax.jit(model.extend), jax.jit(model.hidden)
    hidden, cache = extend(params, model.init_cache(3, width + new), tokens, positions, 0, intervals_of(valid))
    parts = [hidden]
    for step in range(new):
        token = jnp.asarray([[s[length + step]] for s, length in zip(sequences, lengths, strict=True)])
        where = jnp.asarray(lengths)[:, None] + step
        hidden, cache = extend(params, cache, token, where, jnp.int32(width + step))
        parts.append(hidden)
    together = jnp.concatenate(parts, 1)
    for row, (sequence, length) in enumerate(zip(sequences, lengths, strict=True)):
        longer = jnp.zeros((1, width + new), jnp.int32).at[0, : len(sequence)].set(sequence)
        alone = whole(params, longer)[0, : len(sequence)]
        np.testing.assert_allclose(together[row, width - length :], alone, atol=1e-5)
    assert np.isfinite(together).all()


@pytest.mark.parametrize("together", [True, False])
def test_continuations_share_a_prompt_and_do_not_see_each_other(together, model, params):
    prompts, answers = tokens_of(2, 5), tokens_of(6, 3, seed=9).reshape(2, 3, 3)
    valid = jnp.asarray([[True] * 5, [False, False, True, True, True]])
    positions = jnp.maximum(jnp.cumsum(valid, 1) - 1, 0)
    extend = jax.jit(model.extend)
    _, cache = extend(params, model.init_cache(2, 14), prompts, positions, 0, intervals_of(valid))
    branch, found = jnp.arange(3), np.zeros((2, 3, 3, CONFIG.hidden_size))
    lengths, alive = valid.sum(1)[:, None], jnp.ones((2, 3), bool)
    if together:
        for step in range(3):
            where = jnp.broadcast_to(lengths + step, (2, 3))
            intervals = intervals_of(alive, branch, branch + 1)
            hidden, cache = extend(params, cache, answers[:, :, step], where, 5 + 3 * step, intervals)
            found[:, :, step] = hidden
    else:
        for number in range(3):
            intervals = intervals_of(alive, number, number + 1)
            where = lengths + jnp.arange(3)
            hidden, cache = extend(params, cache, answers[:, number], where, 5 + 3 * number, intervals)
            found[:, number] = hidden
    whole = jax.jit(model.hidden)
    for row, number in np.ndindex(2, 3):
        alone = jnp.concatenate([prompts[row][valid[row]], answers[row, number]])
        np.testing.assert_allclose(found[row, number], whole(params, alone[None])[0, -3:], atol=1e-5)


@pytest.mark.parametrize("mesh", [None, "fsdp=2,tensor=2"])
def test_branches_continue_their_row(mesh, model, params):
    """Two rows, three lanes, a ring of four slots that goes round twice; a lane that has ended begins anew."""
    if mesh is not None:
        model = Model.from_config(CONFIG, mesh=make_mesh(mesh))
        params = jax.device_put(params, jax.tree.map(lambda leaf: leaf.sharding, model.abstract_params()))
    answers = np.asarray(tokens_of(2 * 3 * 9, 1, seed=9)).reshape(2, 3, 9)
    begins = np.array([[0, 2, 1], [0, 1, 3]])  # before it, a lane reads what nobody asks for
    prompts, width = [np.asarray(tokens_of(1, length, seed=length))[0] for length in (6, 3)], 6
    tokens, valid, positions = left_padded(prompts, width)
    _, cache = jax.jit(model.extend)(params, model.init_cache(2, width), tokens, positions, 0, intervals_of(valid))
    branches, branch, found = model.init_branches(2, 3, 4), jax.jit(model.branch), {}
    starts = begins.copy()
    for step in range(9):
        starts = np.where(step - starts == 4, step, starts)
        count = np.maximum(step - starts + 1, 0)
        where = np.asarray([6, 3])[:, None] + count - 1
        hidden, branches = branch(params, cache, branches, answers[:, :, step], where, count, jnp.int32(step % 4))
        found |= {(row, lane, step): (starts[row, lane], hidden[row, lane]) for row, lane in np.ndindex(2, 3)}
    whole = jax.jit(Model.from_config(CONFIG).hidden)
    unsharded = jax.device_get(params)
    checked = 0
    for (row, lane, step), (start, hidden) in found.items():
        if step >= start:
            alone = np.zeros((1, width + 4), np.int32)
            sequence = np.concatenate([prompts[row], answers[row, lane, start : step + 1]])
            alone[0, : len(sequence)] = sequence
            expected = whole(unsharded, jnp.asarray(alone))[0, len(sequence) - 1]
            np.testing.assert_allclose(hidden, expected, atol=1e-5)
            checked += 1
    assert checked == 6 * 9 - begins.sum()


def test_a_row_is_replaced_and_no_other(model, params):
    extend = jax.jit(model.extend)

    def read(sequences, width):
        tokens, valid, positions = left_padded([np.asarray(each) for each in sequences], width)
        cache = model.init_cache(len(sequences), width)
        return extend(params, cache, tokens, positions, 0, intervals_of(valid))[1]

    before = [np.asarray(tokens_of(1, length, seed=length))[0] for length in (7, 2, 5, 7)]
    after = [np.asarray(tokens_of(1, length, seed=20 + length))[0] for length in (4, 3)]
    changed = jax.jit(put)(read(before, 7), jnp.array([2, 0, 2]), read([*after, after[0]], 4))
    expected = read([after[1], before[1], after[0], before[3]], 7)
    seen = np.asarray(expected.enter == 0)
    np.testing.assert_array_equal(changed.enter == 0, seen)
    np.testing.assert_array_equal(changed.exit[seen], expected.exit[seen])
    for ours, theirs, axis in ((changed.keys, expected.keys, -1), (changed.values, expected.values, -2)):
        ours, theirs = (np.moveaxis(np.asarray(each), axis, 2)[:, seen] for each in (ours, theirs))
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_a_sharded_cache_gives_the_same(model, params):
    mesh = make_mesh("fsdp=2,tensor=2")
    sharded = Model.from_config(CONFIG, mesh=mesh)
    tokens = tokens_of(4, 6)
    positions = jnp.broadcast_to(jnp.arange(6), (4, 6))
    cache = sharded.init_cache(4, 8)
    assert cache.keys.sharding.shard_shape(cache.keys.shape) == (3, 2, 1, 8, 8)
    placed = jax.device_put(params, jax.tree.map(lambda leaf: leaf.sharding, sharded.abstract_params()))
    hidden, cache = jax.jit(sharded.extend)(placed, cache, tokens, positions, 0)
    assert cache.keys.sharding.shard_shape(cache.keys.shape) == (3, 2, 1, 8, 8)
    np.testing.assert_allclose(hidden, jax.jit(model.hidden)(params, tokens), atol=1e-5)


def test_what_does_not_fit_is_refused(model, params):
    tokens = tokens_of(1, 3)
    with pytest.raises(ValueError, match="start is 2: 3 tokens from there do not fit into a cache of 4 slots"):
        model.extend(params, model.init_cache(1, 4), tokens, jnp.arange(3)[None], 2)
