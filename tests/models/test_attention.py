"""Attention against loops in numpy, on random token forests."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shiq_jax.models import blockwise
from shiq_jax.models.attention import attention, branch_attention
from shiq_jax.models.attention_mask import NEVER, AttentionMask, cache_mask, dense_mask, forest_mask
from shiq_jax.models.cache import slot_intervals


def random_forest(length: int, rng: np.random.Generator):
    """Parents (-1 for roots) and intervals of a random forest in depth-first order."""
    parents, path = [], []
    for token in range(length):
        path = path[: rng.integers(0, len(path) + 1)]
        parents.append(path[-1] if path else -1)
        path.append(token)
    exits = np.arange(1, length + 1)
    for token in reversed(range(length)):
        if parents[token] >= 0:
            exits[parents[token]] = max(exits[parents[token]], exits[token])
    return parents, np.stack([np.arange(length), exits], -1).astype(np.int32)


def ancestors(parents: list[int], token: int) -> list[int]:
    return [] if token < 0 else [*ancestors(parents, parents[token]), token]


def reference_attention(q, k, v, mask, scale):
    out = np.zeros((*q.shape[:3], v.shape[-1]))
    group = q.shape[2] // k.shape[2]
    for row, query, head in np.ndindex(*q.shape[:3]):
        visible = np.flatnonzero(mask[row, query])
        scores = k[row, visible, head // group] @ q[row, query, head] * scale
        weights = np.exp(scores - scores.max())
        out[row, query, head] = weights / weights.sum() @ v[row, visible, head // group]
    return out


@pytest.mark.parametrize("seed", range(5))
def test_visible_keys_are_the_ancestors(seed):
    parents, intervals = random_forest(23, np.random.default_rng(seed))
    mask = np.asarray(dense_mask(forest_mask(jnp.asarray(intervals)[None], 23)))[0]
    for token in range(23):
        assert list(np.flatnonzero(mask[token])) == ancestors(parents, token)


def test_mask_without_intervals_is_causal():
    np.testing.assert_array_equal(dense_mask(forest_mask(None, 6))[0], np.tri(6, dtype=bool))


def enter_and_exit(valid):
    intervals = slot_intervals(valid)
    return intervals[..., 0], intervals[..., 1]


def test_cache_mask_is_causal_and_hides_invalid_slots():
    valid = jnp.array([[False, True, True, True, False, False], [True, True, True, True, True, False]])
    mask = np.asarray(dense_mask(cache_mask(*enter_and_exit(valid), jnp.zeros((2, 2), jnp.int32), 2))).astype(int)
    assert mask.tolist() == [[[0, 1, 1, 0, 0, 0], [0, 1, 1, 1, 0, 0]], [[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0]]]


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (3, 1)])
def test_attention_matches_numpy(heads, kv_heads):
    rng = np.random.default_rng(heads)
    rows, length, head_dim = 2, 11, 8
    q = rng.normal(size=(rows, length, heads, head_dim))
    k, v = rng.normal(size=(2, rows, length, kv_heads, head_dim))
    intervals = np.stack([random_forest(length, rng)[1] for _ in range(rows)])
    mask = forest_mask(jnp.asarray(intervals), length)
    out = attention(*(jnp.asarray(x, jnp.float32) for x in (q, k, v)), mask, scale=0.3)
    np.testing.assert_allclose(out, reference_attention(q, k, v, np.asarray(dense_mask(mask)), 0.3), atol=2e-6)


def test_bfloat16_softmax_runs_in_float32():
    q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 512, 1, 16))
    mask = forest_mask(None, 512)
    exact = attention(q, k, jnp.ones_like(v), mask, scale=0.01)
    rounded = attention(*(x.astype(jnp.bfloat16) for x in (q, k, jnp.ones_like(v))), mask, scale=0.01)
    assert rounded.dtype == jnp.bfloat16
    np.testing.assert_allclose(rounded.astype(jnp.float32), exact, atol=1e-2)


def test_grouped_keys_are_not_repeated_in_memory():
    q, k = jnp.ones((1, 4, 32, 8)), jnp.ones((1, 64, 2, 8))
    program = jax.make_jaxpr(lambda q, k, v: attention(q, k, v, full_cache_mask(4, 64), scale=1.0))(q, k, k)
    largest = max(variable.aval.size for equation in program.eqns for variable in equation.outvars)
    assert largest <= 32 * 4 * 64  # size of the scores; repeated keys would take 64 * 32 * 8


def full_cache_mask(queries: int, keys: int) -> AttentionMask:
    return cache_mask(*enter_and_exit(jnp.ones((1, keys), bool)), jnp.zeros((1, queries), jnp.int32), keys - queries)


@pytest.mark.slow
@pytest.mark.parametrize("start", [None, 0, 5], ids=["rows", "prompt", "cache"])
def test_blocked_attention_matches_a_single_block(start, monkeypatch):
    rng = np.random.default_rng(2)
    rows, queries, keys = 2, 11, 11 if start is None else 17
    q, k, v, weights = (
        jnp.asarray(rng.normal(size=(rows, length, heads, 8)))
        for length, heads in ((queries, 4), (keys, 2), (keys, 2), (queries, 4))
    )
    if start is None:
        intervals = jnp.asarray([[[0, 11]] * 4 + [[4, 8]] * 4 + [[8, 11]] * 3, [[0, 5]] * 5 + [[5, 11]] * 6])
        mask = forest_mask(intervals, queries)
    else:
        query_enter = jnp.asarray(rng.integers(0, 3, (rows, queries)), jnp.int32)
        mask = cache_mask(
            *enter_and_exit(jnp.asarray(rng.random((rows, keys)) < 0.8).at[:, 0].set(True)), query_enter, start
        )

    def values_and_gradients():
        loss = lambda *arrays: jnp.sum(attention(*arrays, mask, scale=0.4) * weights)
        return attention(q, k, v, mask, scale=0.4), *jax.grad(loss, (0, 1, 2))(q, k, v)

    expected = values_and_gradients()
    monkeypatch.setattr(blockwise, "BLOCK", 2)
    # With more blocks than levels, a level scans over several blocks.
    for levels in (8, 2):
        monkeypatch.setattr(blockwise, "LEVELS", levels)
        chex.assert_trees_all_close(values_and_gradients(), expected, rtol=1e-7, atol=2e-6)


def test_query_without_visible_keys_is_finite_and_gives_no_gradient():
    q, k, v = jax.random.normal(jax.random.key(1), (3, 1, 4, 2, 8))
    mask = forest_mask(None, 4)._replace(key_enter=jnp.array([[NEVER, 0, 0, 0]]))

    def total(q, k, v):
        return jnp.sum(attention(q, k, v, mask, scale=1.0)[:, 1:])

    grads = jax.grad(total, (0, 1, 2))(q, k, v)
    assert np.isfinite(attention(q, k, v, mask, scale=1.0)).all()
    assert all(np.isfinite(grad).all() for grad in grads)
    assert not np.any(grads[1][:, 0]) and not np.any(grads[2][:, 0])
    changed = attention(q, k.at[:, 0].set(9.0), v.at[:, 0].set(9.0), mask, scale=1.0)
    np.testing.assert_array_equal(changed[:, 1:], attention(q, k, v, mask, scale=1.0)[:, 1:])


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (3, 1)])
def test_branch_attention_matches_attention_over_prompt_and_branch(heads, kv_heads):
    rng = np.random.default_rng(heads)
    rows, branches, keys, slots, head_dim = 2, 3, 5, 4, 8
    q = rng.normal(size=(rows, branches, heads, head_dim))
    k, v = rng.normal(size=(2, rows, keys, kv_heads, head_dim))
    branch_k, branch_v = rng.normal(size=(2, rows, branches, slots, kv_heads, head_dim))
    prompt_mask, branch_mask = rng.random((rows, keys)) < 0.6, rng.random((rows, branches, slots)) < 0.6
    prompt_mask[:, 0] = True
    branch_mask[0, 0] = False
    out = branch_attention(
        jnp.asarray(q),
        (jnp.asarray(k.transpose(0, 2, 3, 1)), jnp.asarray(v.transpose(0, 2, 1, 3))),
        jnp.asarray(prompt_mask),
        (jnp.asarray(branch_k.transpose(0, 1, 3, 4, 2)), jnp.asarray(branch_v.transpose(0, 1, 3, 2, 4))),
        jnp.asarray(branch_mask),
        scale=0.3,
    )
    for branch in range(branches):
        all_k = np.concatenate([k, branch_k[:, branch]], 1)
        all_v = np.concatenate([v, branch_v[:, branch]], 1)
        mask = np.concatenate([prompt_mask, branch_mask[:, branch]], 1)[:, None]
        expected = reference_attention(q[:, branch : branch + 1], all_k, all_v, mask, 0.3)
        np.testing.assert_allclose(out[:, branch : branch + 1], expected, atol=2e-6)


def test_unknown_engine_raises():
    x = jnp.ones((1, 2, 1, 2))
    with pytest.raises(ValueError, match="engine 'warp' is unknown; the engines are xla"):
        attention(x, x, x, forest_mask(None, 2), scale=1.0, engine="warp")
