"""The attention seam against loops in numpy, on forests drawn at random."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shiq_jax.models import blockwise
from shiq_jax.models.attention import attention, branching
from shiq_jax.models.attention_mask import NEVER, AttentionMask, cache_mask, dense_mask, forest_mask
from shiq_jax.models.cache import intervals_of


def random_forest(length: int, rng: np.random.Generator):
    """Parents (-1 for roots) and intervals of a random forest whose tokens stand in depth-first order."""
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


def slow_attention(q, k, v, mask, scale):
    out = np.zeros((*q.shape[:3], v.shape[-1]))
    shared = q.shape[2] // k.shape[2]
    for row, query, head in np.ndindex(*q.shape[:3]):
        seen = np.flatnonzero(mask[row, query])
        scores = k[row, seen, head // shared] @ q[row, query, head] * scale
        weights = np.exp(scores - scores.max())
        out[row, query, head] = weights / weights.sum() @ v[row, seen, head // shared]
    return out


@pytest.mark.parametrize("seed", range(5))
def test_a_token_sees_itself_and_its_ancestors(seed):
    parents, intervals = random_forest(23, np.random.default_rng(seed))
    mask = np.asarray(dense_mask(forest_mask(jnp.asarray(intervals)[None], 23)))[0]
    for token in range(23):
        assert list(np.flatnonzero(mask[token])) == ancestors(parents, token)


def test_without_intervals_it_is_causal():
    np.testing.assert_array_equal(dense_mask(forest_mask(None, 6))[0], np.tri(6, dtype=bool))


def of_slots(valid):
    intervals = intervals_of(valid)
    return intervals[..., 0], intervals[..., 1]


def test_cached_tokens_see_valid_slots_up_to_their_own():
    valid = jnp.array([[False, True, True, True, False, False], [True, True, True, True, True, False]])
    mask = np.asarray(dense_mask(cache_mask(*of_slots(valid), jnp.zeros((2, 2), jnp.int32), 2))).astype(int)
    assert mask.tolist() == [[[0, 1, 1, 0, 0, 0], [0, 1, 1, 1, 0, 0]], [[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0]]]


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (3, 1)])
def test_values_equal_loops(heads, kv_heads):
    rng = np.random.default_rng(heads)
    rows, length, head_dim = 2, 11, 8
    q = rng.normal(size=(rows, length, heads, head_dim))
    k, v = rng.normal(size=(2, rows, length, kv_heads, head_dim))
    intervals = np.stack([random_forest(length, rng)[1] for _ in range(rows)])
    mask = forest_mask(jnp.asarray(intervals), length)
    out = attention(*(jnp.asarray(x, jnp.float32) for x in (q, k, v)), mask, scale=0.3)
    np.testing.assert_allclose(out, slow_attention(q, k, v, np.asarray(dense_mask(mask)), 0.3), atol=2e-6)


def test_bfloat16_is_reduced_in_float32():
    q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 512, 1, 16))
    mask = forest_mask(None, 512)
    exact = attention(q, k, jnp.ones_like(v), mask, scale=0.01)
    rough = attention(*(x.astype(jnp.bfloat16) for x in (q, k, jnp.ones_like(v))), mask, scale=0.01)
    assert rough.dtype == jnp.bfloat16
    np.testing.assert_allclose(rough.astype(jnp.float32), exact, atol=1e-2)


def test_keys_are_not_repeated_in_memory():
    q, k = jnp.ones((1, 4, 32, 8)), jnp.ones((1, 64, 2, 8))
    program = jax.make_jaxpr(lambda q, k, v: attention(q, k, v, forest_of(4, 64), scale=1.0))(q, k, k)
    largest = max(variable.aval.size for equation in program.eqns for variable in equation.outvars)
    assert largest <= 32 * 4 * 64  # the scores; repeated keys would be 64 * 32 * 8, twice that


def forest_of(queries: int, keys: int) -> AttentionMask:
    return cache_mask(*of_slots(jnp.ones((1, keys), bool)), jnp.zeros((1, queries), jnp.int32), keys - queries)


@pytest.mark.slow
@pytest.mark.parametrize("start", [None, 0, 5], ids=["rows", "prompt", "cache"])
def test_blocks_of_queries_are_the_whole(start, monkeypatch):
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
        own = jnp.asarray(rng.integers(0, 3, (rows, queries)), jnp.int32)
        mask = cache_mask(*of_slots(jnp.asarray(rng.random((rows, keys)) < 0.8).at[:, 0].set(True)), own, start)

    def values_and_gradients():
        run = lambda *arrays: jnp.sum(attention(*arrays, mask, scale=0.4) * weights)
        return attention(q, k, v, mask, scale=0.4), *jax.grad(run, (0, 1, 2))(q, k, v)

    whole = values_and_gradients()
    monkeypatch.setattr(blockwise, "BLOCK", 2)
    # More blocks than levels go through loops.
    for levels in (8, 2):
        monkeypatch.setattr(blockwise, "LEVELS", levels)
        for ours, theirs in zip(values_and_gradients(), whole, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=2e-6)


def test_a_query_that_sees_nothing_is_finite_and_harmless():
    q, k, v = jax.random.normal(jax.random.key(1), (3, 1, 4, 2, 8))
    mask = forest_mask(None, 4)._replace(key_enter=jnp.array([[NEVER, 0, 0, 0]]))

    def total(q, k, v):
        return jnp.sum(attention(q, k, v, mask, scale=1.0)[:, 1:])

    grads = jax.grad(total, (0, 1, 2))(q, k, v)
    assert np.isfinite(attention(q, k, v, mask, scale=1.0)).all()
    assert all(np.isfinite(grad).all() for grad in grads)
    assert not np.any(grads[1][:, 0]) and not np.any(grads[2][:, 0])
    elsewhere = attention(q, k.at[:, 0].set(9.0), v.at[:, 0].set(9.0), mask, scale=1.0)
    np.testing.assert_array_equal(elsewhere[:, 1:], attention(q, k, v, mask, scale=1.0)[:, 1:])


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (3, 1)])
def test_branching_is_attention_over_both_parts(heads, kv_heads):
    rng = np.random.default_rng(heads)
    rows, branches, keys, slots, head_dim = 2, 3, 5, 4, 8
    q = rng.normal(size=(rows, branches, heads, head_dim))
    k, v = rng.normal(size=(2, rows, keys, kv_heads, head_dim))
    own_k, own_v = rng.normal(size=(2, rows, branches, slots, kv_heads, head_dim))
    seen, own_seen = rng.random((rows, keys)) < 0.6, rng.random((rows, branches, slots)) < 0.6
    seen[:, 0] = True
    own_seen[0, 0] = False
    out = branching(
        jnp.asarray(q), (jnp.asarray(k.transpose(0, 2, 3, 1)), jnp.asarray(v.transpose(0, 2, 1, 3))), jnp.asarray(seen),
        (jnp.asarray(own_k.transpose(0, 1, 3, 4, 2)), jnp.asarray(own_v.transpose(0, 1, 3, 2, 4))),
        jnp.asarray(own_seen), scale=0.3,
    )  # fmt: skip
    for branch in range(branches):
        together = [np.concatenate([shared, own[:, branch]], 1) for shared, own in ((k, own_k), (v, own_v))]
        mask = np.concatenate([seen, own_seen[:, branch]], 1)[:, None]
        expected = slow_attention(q[:, branch : branch + 1], *together, mask, 0.3)
        np.testing.assert_allclose(out[:, branch : branch + 1], expected, atol=2e-6)


def test_unknown_engine():
    x = jnp.ones((1, 2, 1, 2))
    with pytest.raises(ValueError, match="engine 'warp' is unknown; the engines are xla"):
        attention(x, x, x, forest_mask(None, 2), scale=1.0, engine="warp")
