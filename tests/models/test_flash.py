"""The attention kernel against the XLA engine, and its programs for accelerators."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from shiq_jax.models.attention import attention
from shiq_jax.models.attention_mask import AttentionMask, cache_mask, forest_mask
from shiq_jax.models.flash import BLOCK, flash
from shiq_jax.sharding import make_mesh
from tests.models.test_attention import random_forest


def arrays(rng, rows, queries, keys, heads, kv_heads, head_dim, dtype=jnp.float32):
    shapes = [(rows, queries, heads, head_dim)] + [(rows, keys, kv_heads, head_dim)] * 2
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def both(q, k, v, mask, mesh=None, weigh=None):
    """Output and gradients of either engine, of a sum weighted at random."""
    weigh = jax.random.normal(jax.random.key(1), q.shape) if weigh is None else weigh
    found = []
    for engine in ("xla", "flash"):

        def total(q, k, v, engine=engine):
            out = attention(q, k, v, mask, scale=0.3, engine=engine, mesh=mesh)
            return jnp.sum(out.astype(jnp.float32) * weigh), out

        found.append(jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))(q, k, v))
    return [(each[0][1], *each[1]) for each in found]


def assert_close(expected, found, bound):
    for one, other in zip(expected, found, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        one, other = (np.asarray(each, np.float64) for each in (one, other))
        assert np.linalg.norm(one - other) < bound * np.linalg.norm(one)


@pytest.mark.parametrize(
    ("length", "heads", "kv_heads", "head_dim"), [(2 * BLOCK, 2, 2, 16), (300, 6, 2, 24), (70, 3, 1, 64)]
)
def test_values_and_gradients_equal_those_of_xla_on_forests(length, heads, kv_heads, head_dim):
    rng = np.random.default_rng(length)
    intervals = np.stack([random_forest(length, rng)[1] for _ in range(2)])
    q, k, v = arrays(rng, 2, length, length, heads, kv_heads, head_dim)
    assert_close(*both(q, k, v, forest_mask(jnp.asarray(intervals), length)), 1e-6)


def test_rows_of_separate_groups_and_padding():
    """Groups of a row see nothing of each other, so that most tiles are left out; what is padded sees only padding."""
    length, rng = 3 * BLOCK, np.random.default_rng(0)
    parts = np.repeat([0, 130, 260, 350], [130, 130, 90, 34])
    ends = np.repeat([130, 260, 350, 384], [130, 130, 90, 34])
    intervals = jnp.asarray(np.stack([parts, ends], -1)[None], jnp.int32)
    q, k, v = arrays(rng, 1, length, length, 2, 1, 16)
    assert_close(*both(q, k, v, forest_mask(intervals, length)), 1e-6)


def test_queries_that_stand_elsewhere_than_their_keys():
    rng = np.random.default_rng(3)
    enter, exit_ = np.zeros((2, 200), np.int32), np.ones((2, 200), np.int32)
    q, k, v = arrays(rng, 2, 9, 200, 4, 2, 16)
    mask = cache_mask(jnp.asarray(enter), jnp.asarray(exit_), jnp.zeros((2, 9), jnp.int32), jnp.int32(150))
    assert not mask.aligned
    assert_close(*both(q, k, v, mask), 1e-6)


def test_a_query_that_sees_nothing_is_finite_and_sends_no_gradient():
    rng = np.random.default_rng(4)
    q, k, v = arrays(rng, 1, 40, 40, 2, 2, 16)
    blind = jnp.arange(40)[None] < 5
    visible = forest_mask(None, 40)
    mask = AttentionMask(*visible[:2], visible.key_index, visible.key_enter, visible.key_exit, aligned=True)
    mask = mask._replace(query_enter=jnp.where(blind, 7, visible.query_enter))
    (_, expected, *_), (out, found, *_) = both(q, k, v, mask)
    assert np.isfinite(out).all() and not np.any(found[:, :5])
    np.testing.assert_allclose(found[:, 5:], expected[:, 5:], atol=1e-5)


def test_bfloat16_is_as_close_to_float32_as_xla_is():
    rng = np.random.default_rng(5)
    precise = arrays(rng, 1, 200, 200, 4, 2, 64)
    exact = both(*precise, forest_mask(None, 200))[0]
    rounded = both(*(x.astype(jnp.bfloat16) for x in precise), forest_mask(None, 200))
    for one, xla, kernel in zip(exact, *rounded, strict=True):
        assert kernel.dtype == jnp.bfloat16
        error = [np.linalg.norm(np.asarray(each, np.float64) - one) for each in (xla, kernel)]
        assert error[1] < 1.2 * error[0] + 1e-3


@pytest.mark.parametrize("mesh", ["fsdp=4,tensor=2", "fsdp=2,tensor=4"])
def test_devices_have_their_own_rows_and_heads(mesh):
    """Two groups of heads are dealt out over two devices, and are everywhere when there are four."""
    mesh, rng = make_mesh(mesh), np.random.default_rng(6)
    intervals = jnp.asarray(np.stack([random_forest(50, rng)[1] for _ in range(4)]))
    assert_close(*both(*arrays(rng, 4, 50, 50, 4, 2, 16), forest_mask(intervals, 50), mesh=mesh), 1e-6)


def gradient(q, k, v, intervals):
    def total(q, k, v):
        return flash(q, k, v, forest_mask(intervals, q.shape[2]), 0.1, True).astype(jnp.float32).sum()

    return jax.grad(total, argnums=(0, 1, 2))(q, k, v)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("platform", "call"), [("cuda", "__gpu$xla.gpu.triton"), ("tpu", "tpu_custom_call")])
def test_three_kernels_are_lowered_for_accelerators(platform, call, dtype):
    shapes = [(2, 8, 1000, 64), (2, 2, 1000, 64), (2, 2, 1000, 64)]
    operands = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    intervals = jax.ShapeDtypeStruct((2, 1000, 2), jnp.int32)
    device = AbstractDevice("TPU v5 lite", 1, "tpu") if platform == "tpu" else None
    mesh = AbstractMesh((1,), ("only",), axis_types=(AxisType.Auto,), abstract_device=device)
    allowed = [jax.export.DisabledSafetyCheck.custom_call(call)]
    with jax.sharding.use_abstract_mesh(mesh):
        exported = jax.export.export(jax.jit(gradient), platforms=[platform], disabled_checks=allowed)
        program = str(exported(*operands, intervals).mlir_module())
    assert program.count(f"@{call}(") == 3
