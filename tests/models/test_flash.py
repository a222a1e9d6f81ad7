"""The flash attention kernel against the XLA engine, and its lowering for accelerators."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from shiq_jax.models.attention import attention
from shiq_jax.models.attention_mask import cache_mask, forest_mask
from shiq_jax.models.flash import BLOCK, flash
from shiq_jax.sharding import make_mesh
from tests.models.test_attention import random_forest


def random_qkv(rng, rows, queries, keys, heads, kv_heads, head_dim, dtype=jnp.float32):
    shapes = [(rows, queries, heads, head_dim)] + [(rows, keys, kv_heads, head_dim)] * 2
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def run_engines(q, k, v, mask, mesh=None):
    """(output, dq, dk, dv) of the XLA and of the flash engine, for a randomly weighted sum of outputs."""
    weights = jax.random.normal(jax.random.key(1), q.shape)
    results = []
    for engine in ("xla", "flash"):

        def loss(q, k, v, engine=engine):
            out = attention(q, k, v, mask, scale=0.3, engine=engine, mesh=mesh)
            return jnp.sum(out.astype(jnp.float32) * weights), out

        (_, out), grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)
        results.append((out, *grads))
    return results


def assert_close(expected, actual, tolerance):
    """Compare relative errors in norm."""
    chex.assert_trees_all_equal_shapes_and_dtypes(expected, actual)
    for x, y in zip(expected, actual, strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        assert np.linalg.norm(x - y) < tolerance * np.linalg.norm(x)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("length", "heads", "kv_heads", "head_dim"), [(2 * BLOCK, 2, 2, 16), (300, 6, 2, 24), (70, 3, 1, 64)]
)
def test_forests_match_xla(length, heads, kv_heads, head_dim):
    rng = np.random.default_rng(length)
    intervals = np.stack([random_forest(length, rng)[1] for _ in range(2)])
    q, k, v = random_qkv(rng, 2, length, length, heads, kv_heads, head_dim)
    assert_close(*run_engines(q, k, v, forest_mask(jnp.asarray(intervals), length)), 1e-6)


def test_separate_groups_and_padding_match_xla():
    """Groups of a row do not see each other, so most tiles are skipped; padding sees only padding."""
    length, rng = 3 * BLOCK, np.random.default_rng(0)
    starts = np.repeat([0, 130, 260, 350], [130, 130, 90, 34])
    ends = np.repeat([130, 260, 350, 384], [130, 130, 90, 34])
    intervals = jnp.asarray(np.stack([starts, ends], -1)[None], jnp.int32)
    q, k, v = random_qkv(rng, 1, length, length, 2, 1, 16)
    assert_close(*run_engines(q, k, v, forest_mask(intervals, length)), 1e-6)


def test_unaligned_queries_match_xla():
    rng = np.random.default_rng(3)
    enter, exit_ = np.zeros((2, 200), np.int32), np.ones((2, 200), np.int32)
    q, k, v = random_qkv(rng, 2, 9, 200, 4, 2, 16)
    mask = cache_mask(jnp.asarray(enter), jnp.asarray(exit_), jnp.zeros((2, 9), jnp.int32), jnp.int32(150))
    assert not mask.aligned
    assert_close(*run_engines(q, k, v, mask), 1e-6)


def test_query_without_visible_keys_is_finite_and_gives_no_gradient():
    rng = np.random.default_rng(4)
    q, k, v = random_qkv(rng, 1, 40, 40, 2, 2, 16)
    causal = forest_mask(None, 40)
    mask = causal._replace(query_enter=jnp.where(jnp.arange(40)[None] < 5, 7, causal.query_enter))
    (_, expected, *_), (out, dq, *_) = run_engines(q, k, v, mask)
    assert np.isfinite(out).all() and not np.any(dq[:, :5])
    np.testing.assert_allclose(dq[:, 5:], expected[:, 5:], atol=1e-5)


def test_bfloat16_error_is_at_most_that_of_xla():
    rng = np.random.default_rng(5)
    qkv = random_qkv(rng, 1, 200, 200, 4, 2, 64)
    exact = run_engines(*qkv, forest_mask(None, 200))[0]
    rounded = run_engines(*(x.astype(jnp.bfloat16) for x in qkv), forest_mask(None, 200))
    for expected, xla, kernel in zip(exact, *rounded, strict=True):
        assert kernel.dtype == jnp.bfloat16
        xla_error, kernel_error = (np.linalg.norm(np.asarray(x, np.float64) - expected) for x in (xla, kernel))
        assert kernel_error < 1.2 * xla_error + 1e-3


@pytest.mark.parametrize("mesh", ["fsdp=4,tensor=2", "fsdp=2,tensor=4"])
def test_sharded_attention_matches_xla(mesh):
    """Two kv heads are sharded over two devices and replicated over four."""
    mesh, rng = make_mesh(mesh), np.random.default_rng(6)
    intervals = jnp.asarray(np.stack([random_forest(50, rng)[1] for _ in range(4)]))
    assert_close(*run_engines(*random_qkv(rng, 4, 50, 50, 4, 2, 16), forest_mask(intervals, 50), mesh=mesh), 1e-6)


def gradients(q, k, v, intervals):
    def loss(q, k, v):
        return flash(q, k, v, forest_mask(intervals, q.shape[2]), 0.1, True).astype(jnp.float32).sum()

    return jax.grad(loss, argnums=(0, 1, 2))(q, k, v)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("platform", "call"), [("cuda", "__gpu$xla.gpu.triton"), ("tpu", "tpu_custom_call")])
def test_lowering_for_accelerators(platform, call, dtype):
    shapes = [(2, 8, 1000, 64), (2, 2, 1000, 64), (2, 2, 1000, 64)]
    operands = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    intervals = jax.ShapeDtypeStruct((2, 1000, 2), jnp.int32)
    device = AbstractDevice("TPU v5 lite", 1, "tpu") if platform == "tpu" else None
    mesh = AbstractMesh((1,), ("only",), axis_types=(AxisType.Auto,), abstract_device=device)
    allowed = [jax.export.DisabledSafetyCheck.custom_call(call)]
    with jax.sharding.use_abstract_mesh(mesh):
        exported = jax.export.export(jax.jit(gradients), platforms=[platform], disabled_checks=allowed)
        program = str(exported(*operands, intervals).mlir_module())
    assert program.count(f"@{call}(") == 3
