"""Chunked token statistics against the dense computation: values, gradients, memory, flops and sharding."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

from shiq_jax.objectives import TokenStats, token_statistics, token_stats, token_stats_from_logits

ROWS, DEPTH, COLUMNS, VOCAB_SIZE = 24, 8, 40, 33
HEADS = {
    "plain": {},
    "softcap": {"softcap": 3.0},
    "scale": {"scale": 0.7},
    "padded": {"vocab_size": VOCAB_SIZE},
    "everything": {"softcap": 3.0, "scale": 0.7, "vocab_size": VOCAB_SIZE},
}


def inputs(dtype=np.float64, seed=0, rows=ROWS):
    random = np.random.default_rng(seed)
    hidden = random.normal(size=(rows, DEPTH)).astype(dtype)
    unembedding = random.normal(size=(DEPTH, COLUMNS)).astype(dtype)
    bias = random.normal(size=COLUMNS).astype(dtype)
    return hidden, unembedding, bias, random.integers(0, VOCAB_SIZE, rows)


@partial(jax.jit, static_argnames=("softcap", "scale", "vocab_size"))
def dense(hidden, unembedding, bias, tokens, *, softcap=None, scale=None, vocab_size=None):
    """Statistics computed from the full logits."""
    logits = hidden @ unembedding * (1 if scale is None else scale) + (0 if bias is None else bias)
    logits = logits if softcap is None else softcap * jnp.tanh(logits / softcap)
    logits = logits[..., :vocab_size]
    logp = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], -1)[..., 0]
    return TokenStats(logp, jax.nn.logsumexp(logits, -1), jax.nn.logsumexp(2 * logits, -1))


@partial(jax.jit, static_argnames=("softcap", "scale", "vocab_size", "chunk_size", "axis_name"))
def chunked(hidden, unembedding, bias, tokens, **options):
    return token_stats(hidden, unembedding, tokens, bias=bias, extra=("lse2",), **options)


def weighted_sum(stats):
    """Random weighted sum, with a different cotangent for every statistic of every row."""
    weights = np.random.default_rng(99).normal(size=(len(stats), *stats[0].shape))
    return sum(jnp.sum(w * x) for w, x in zip(weights, stats))


def value_and_gradients(compute, hidden, unembedding, bias, tokens):
    def loss(*differentiable):
        stats = compute(*differentiable, tokens)
        return weighted_sum(stats), stats

    (_, stats), gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(hidden, unembedding, bias)
    return stats, gradients


def assert_close(actual, expected, atol):
    chex.assert_trees_all_close(actual, expected, atol=atol, rtol=0)


# --- values and gradients --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "head, chunk_size", [(head, 7) for head in HEADS] + [("everything", size) for size in (None, 1, ROWS)]
)
def test_matches_dense_computation(x64, head, chunk_size):
    expected = value_and_gradients(partial(dense, **HEADS[head]), *inputs())
    actual = value_and_gradients(partial(chunked, chunk_size=chunk_size, **HEADS[head]), *inputs())
    assert_close(actual, expected, 1e-12)


@pytest.mark.parametrize("head", HEADS)
def test_matches_dense_computation_in_float32(head):
    expected = value_and_gradients(partial(dense, **HEADS[head]), *inputs(np.float32))
    actual = value_and_gradients(partial(chunked, chunk_size=7, **HEADS[head]), *inputs(np.float32))
    assert_close(actual, expected, 1e-4)


def test_gradient_matches_finite_differences(x64):
    *differentiable, tokens = map(jnp.asarray, inputs(rows=5))
    check_grads(
        lambda *x: weighted_sum(chunked(*x, tokens, chunk_size=2, **HEADS["everything"])),
        differentiable,
        1,
        modes=["rev"],
    )


@pytest.mark.parametrize("shape", [(), (5,), (2, 1, 4), (0,)])
def test_any_leading_axes(x64, shape):
    random = np.random.default_rng(1)
    hidden, tokens = random.normal(size=(*shape, DEPTH)), random.integers(0, VOCAB_SIZE, shape)
    _, unembedding, bias, _ = inputs()
    actual = chunked(hidden, unembedding, bias, tokens, chunk_size=2)
    assert all(x.shape == shape for x in actual)
    assert_close(actual, dense(hidden, unembedding, bias, tokens), 1e-12)


def test_lse2_is_optional():
    hidden, unembedding, bias, tokens = inputs(np.float32)
    without_lse2 = token_stats(hidden, unembedding, tokens, bias=bias)
    assert without_lse2.lse2 is None
    assert_close(without_lse2[:2], chunked(hidden, unembedding, bias, tokens)[:2], 0)
    stats = chunked(hidden, unembedding, None, tokens)
    probabilities = jax.nn.softmax(hidden @ unembedding)
    np.testing.assert_allclose(np.exp(stats.lse2 - 2 * stats.lse), np.sum(probabilities**2, -1), rtol=1e-5)


def test_gradient_of_a_single_statistic(x64):
    """The gradient of each statistic alone matches that of the dense computation."""
    hidden, unembedding, bias, tokens = inputs()
    for index in range(3):

        def gradient(compute):
            return jax.jit(jax.grad(lambda h: jnp.sum(compute(h, unembedding, bias, tokens)[index])))(hidden)

        assert_close(gradient(chunked), gradient(dense), 1e-12)


def test_constant_offset_of_logits_changes_lse_only(x64):
    hidden, unembedding, bias, tokens = inputs()
    before, after = (chunked(hidden, unembedding, bias + c, tokens) for c in (0, 2.5))
    np.testing.assert_allclose(after.logp, before.logp, atol=1e-12)
    np.testing.assert_allclose(after.lse, before.lse + 2.5, atol=1e-12)


def test_vocabulary_slices_combine_by_logaddexp(x64):
    hidden, unembedding, bias, tokens = inputs()
    slices = [chunked(hidden, unembedding[:, s], bias[s], 0 * tokens) for s in (slice(0, 13), slice(13, None))]
    whole = chunked(hidden, unembedding, bias, tokens)
    np.testing.assert_allclose(np.logaddexp(slices[0].lse, slices[1].lse), whole.lse, atol=1e-12)


def test_large_logits_do_not_overflow():
    hidden, unembedding, _, tokens = inputs(np.float32)
    stats = chunked(1e4 * hidden, unembedding, None, tokens)
    expected = dense(1e4 * hidden.astype(float), unembedding.astype(float), None, tokens)
    assert all(np.isfinite(x).all() for x in stats)
    np.testing.assert_allclose(stats.lse, expected.lse, rtol=1e-6)


def test_batches_by_vmap(x64):
    hidden, unembedding, bias, tokens = inputs()
    hidden, tokens = hidden.reshape(4, 6, DEPTH), tokens.reshape(4, 6)
    actual = jax.jit(jax.vmap(partial(chunked, chunk_size=4), (0, None, None, 0)))(hidden, unembedding, bias, tokens)
    assert_close(actual, dense(hidden, unembedding, bias, tokens), 1e-12)

    def loss(unembedding, hidden, tokens):
        return jnp.sum(chunked(hidden, unembedding, bias, tokens, chunk_size=4).logp)

    gradients = jax.jit(jax.vmap(jax.grad(loss), (None, 0, 0)))(unembedding, hidden, tokens)
    np.testing.assert_allclose(np.sum(gradients, 0), jax.jit(jax.grad(loss))(unembedding, hidden, tokens), atol=1e-12)


# --- precision -------------------------------------------------------------------------------------------------------


def test_bfloat16_inputs_give_float32_statistics():
    """Products of bfloat16 numbers are exact in float32, so casting the inputs first changes nothing."""
    hidden, unembedding, bias, tokens = inputs(jnp.bfloat16)
    stats = chunked(hidden, unembedding, bias, tokens, chunk_size=5)
    assert all(x.dtype == jnp.float32 for x in stats)
    float32 = (x.astype(np.float32) for x in (hidden, unembedding, bias))
    assert_close(stats, dense(*float32, tokens), 2e-5)


@pytest.mark.parametrize("master", ["float32", "bfloat16"])
def test_unembedding_gradient_accumulates_in_float32(master):
    """With 512 chunks of one row, a bfloat16 accumulator would stall; float32 keeps the error of a single rounding."""
    hidden, unembedding, bias, tokens = inputs(np.float32, rows=512)
    hidden, unembedding = jnp.asarray(np.abs(hidden), jnp.bfloat16), jnp.asarray(unembedding, master)

    def loss(compute, unembedding, *rest):
        return jnp.sum(compute(*rest[:1], unembedding, *rest[1:]).lse)

    actual = jax.jit(jax.grad(partial(loss, partial(chunked, chunk_size=1))))(unembedding, hidden, bias, tokens)
    assert actual.dtype == master
    exact = jax.jit(jax.grad(partial(loss, dense)))(
        unembedding.astype(jnp.bfloat16).astype(jnp.float32), hidden.astype(jnp.float32), bias, tokens
    )
    error = np.linalg.norm(actual.astype(np.float32) - exact) / np.linalg.norm(exact)
    assert error < 2**-8


# --- memory and flops ------------------------------------------------------------------------------------------------


def equations(jaxpr, times=1, inside=()):
    """Every equation of a jaxpr with its number of executions and the enclosing primitives."""
    for equation in jaxpr.eqns:
        yield equation, times, inside
        repeats = equation.params["length"] if equation.primitive.name == "scan" else 1
        for parameter in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                yield from equations(inner, times * repeats, (*inside, equation.primitive.name))


def program(rows, columns, depth, chunk_size, dtype=jnp.bfloat16):
    def loss(hidden, unembedding, bias, tokens):
        return weighted_sum(chunked(hidden, unembedding, bias, tokens, chunk_size=chunk_size, **HEADS["everything"]))

    arguments = [jax.ShapeDtypeStruct(s, dtype) for s in ((rows, depth), (depth, columns), (columns,))]
    arguments.append(jax.ShapeDtypeStruct((rows,), jnp.int32))
    return loss, arguments


@pytest.mark.parametrize("rows", [96, 100])
def test_logits_are_never_materialized(rows):
    columns, depth, chunk = 64, 8, 8
    loss, arguments = program(rows, columns, depth, chunk)
    traced = jax.make_jaxpr(jax.value_and_grad(loss, (0, 1, 2)))(*arguments)
    sizes = [v.aval.size for e, _, _ in equations(traced.jaxpr) for v in e.outvars]
    assert len(sizes) > 100
    assert max(sizes) < 1.2 * max(rows * depth, chunk * columns, depth * columns) < rows * columns


def test_flops_are_one_product_forward_and_three_backward():
    rows, columns, depth = 96, 64, 8
    loss, arguments = program(rows, columns, depth, 8)

    def flops(function):
        total = 0
        for equation, times, _ in equations(jax.make_jaxpr(function)(*arguments).jaxpr):
            if equation.primitive.name == "dot_general":
                (contracted, _), _ = equation.params["dimension_numbers"]
                left = equation.invars[0].aval.shape
                total += 2 * times * equation.outvars[0].aval.size * np.prod([left[i] for i in contracted])
        return total

    product = 2 * rows * columns * depth
    assert flops(loss) == product
    assert flops(jax.grad(loss, (0, 1, 2))) == 4 * product


def test_products_run_in_the_dtype_of_hidden_and_accumulate_in_float32():
    loss, arguments = program(96, 64, 8, 8)
    arguments[1] = jax.ShapeDtypeStruct((8, 64), jnp.float32)
    products = [
        e
        for e, _, _ in equations(jax.make_jaxpr(jax.grad(loss, (0, 1)))(*arguments).jaxpr)
        if e.primitive.name == "dot_general"
    ]
    assert len(products) == 4
    for product in products:
        assert [v.aval.dtype for v in product.invars] == [jnp.bfloat16] * 2
        assert product.outvars[0].aval.dtype == jnp.float32


def test_compiled_memory_does_not_grow_by_logits():
    """The temporary memory of the compiled gradient grows per row by far less than a row of logits."""
    columns, depth, chunk = 4096, 16, 32

    def temporary_bytes(rows):
        loss, arguments = program(rows, columns, depth, chunk, jnp.float32)
        compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*arguments).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary_bytes(1024) - temporary_bytes(256) < (1024 - 256) * columns * 4 / 10


def test_default_chunk_stays_within_the_budget():
    for rows, columns in ((10, 50), (8192, 128_256), (100_003, 49_152), (5, 2**27)):
        chunk = token_statistics._rows_per_chunk(rows, columns, None)
        assert chunk * columns <= max(token_statistics.CHUNK_BUDGET, columns)
        chunks = -(-rows // chunk)
        assert chunks * chunk - rows < chunks


# --- sharding --------------------------------------------------------------------------------------------------------

IN_SPECS = (P("rows"), P(None, "vocabulary"), P("vocabulary"), P("rows"))


def mesh():
    return jax.make_mesh((2, 4), ("rows", "vocabulary"), axis_types=(AxisType.Auto,) * 2)


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("head", ["plain", "everything"])
def test_sharded_matches_unsharded(x64, head, check_vma):
    """The last slice of the padded vocabulary holds columns 30 to 39; columns from 33 on are padding."""
    local = partial(chunked, axis_name="vocabulary", chunk_size=5, **HEADS[head])
    sharded = jax.shard_map(local, mesh=mesh(), in_specs=IN_SPECS, out_specs=P("rows"), check_vma=check_vma)
    expected = value_and_gradients(partial(dense, **HEADS[head]), *inputs())
    assert_close(value_and_gradients(sharded, *inputs()), expected, 1e-12)


@pytest.mark.parametrize("check_vma", [True, False])
def test_slices_with_padding_only(x64, check_vma):
    hidden, unembedding, bias, tokens = inputs()
    tokens = tokens % 18
    for head in ({"vocab_size": 18}, {"vocab_size": 18, "softcap": 3.0}):
        local = partial(chunked, axis_name="vocabulary", **head)
        sharded = jax.shard_map(local, mesh=mesh(), in_specs=IN_SPECS, out_specs=P("rows"), check_vma=check_vma)
        actual = value_and_gradients(sharded, hidden, unembedding, bias, tokens)
        assert_close(actual, value_and_gradients(partial(dense, **head), hidden, unembedding, bias, tokens), 1e-12)


def test_gradient_inside_shard_map(x64):
    """jax.grad inside shard_map already sums the gradients of replicated arguments."""

    def local(hidden, unembedding, bias, tokens, weights):
        def loss(*x):
            stats = chunked(*x, tokens, axis_name="vocabulary", chunk_size=5)
            return sum(jnp.sum(w * s) for w, s in zip(weights, stats))

        return jax.grad(loss, (0, 1, 2))(hidden, unembedding, bias)

    weights = np.random.default_rng(99).normal(size=(3, ROWS))
    specs = (*IN_SPECS, P(None, "rows"))
    actual = jax.jit(jax.shard_map(local, mesh=mesh(), in_specs=specs, out_specs=IN_SPECS[:3]))(*inputs(), weights)
    assert_close(actual, value_and_gradients(dense, *inputs())[1], 1e-12)


@pytest.mark.parametrize("check_vma", [True, False])
def test_gathered_unembedding_has_one_reduce_scatter_in_its_gradient(x64, check_vma):
    def local(hidden, unembedding, bias, tokens):
        unembedding = jax.lax.all_gather(unembedding, "rows", axis=0, tiled=True)
        return chunked(hidden, unembedding, bias, tokens, axis_name="vocabulary", chunk_size=5)

    specs = (P("rows"), P("rows", "vocabulary"), P("vocabulary"), P("rows"))
    sharded = jax.shard_map(local, mesh=mesh(), in_specs=specs, out_specs=P("rows"), check_vma=check_vma)
    assert_close(value_and_gradients(sharded, *inputs()), value_and_gradients(dense, *inputs()), 1e-12)

    hidden, unembedding, bias, tokens = map(jnp.asarray, inputs())
    gradient = jax.make_jaxpr(jax.grad(lambda u: weighted_sum(sharded(hidden, u, bias, tokens))))(unembedding)
    collectives = [
        (e.primitive.name, inside)
        for e, _, inside in equations(gradient.jaxpr)
        if e.primitive.name.startswith(("psum", "pmax", "all_gather", "all_reduce", "reduce_scatter", "all_to_all"))
    ]
    assert sum(name == "reduce_scatter" for name, _ in collectives) == 1
    assert not any("scan" in inside for _, inside in collectives)


# --- from logits -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, atol", [("float64", 1e-12), ("float32", 1e-5)])
def test_stats_from_logits_match_token_stats(dtype, atol):
    with jax.enable_x64(dtype == "float64"):
        hidden, unembedding, _, tokens = inputs(dtype)
        fused = token_stats(hidden, unembedding, tokens, chunk_size=7)
        from_logits = token_stats_from_logits(hidden @ unembedding, tokens)
        assert from_logits.logp.dtype == dtype and from_logits.lse2 is None
        assert_close(from_logits[:2], fused[:2], atol)


def test_stats_from_bfloat16_logits():
    logits = jnp.asarray(np.random.default_rng(2).normal(size=(3, 5)), jnp.bfloat16)
    actual = token_stats_from_logits(logits, np.array([0, 4, 2]))
    assert actual.lse.dtype == jnp.float32
    np.testing.assert_allclose(actual.lse, jax.nn.logsumexp(logits.astype(jnp.float32), -1), rtol=1e-6)


# --- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        ({"hidden": np.zeros((3, 5))}, r"hidden has shape \(3, 5\) but unembedding \(4, 6\)"),
        ({"unembedding": np.zeros(4)}, "unembedding"),
        ({"tokens": np.zeros(2, int)}, r"tokens have shape \(2,\) but hidden \(3, 4\)"),
        ({"bias": np.zeros(5)}, r"bias has shape \(5,\)"),
        ({"chunk_size": 0}, "chunk_size is 0"),
        ({"softcap": -1.0}, "softcap is -1.0"),
        ({"scale": 0.0}, "scale is 0.0"),
        ({"scale": np.ones(2)}, "scale is a ndarray"),
        ({"vocab_size": 7}, "vocab_size is 7 but the unembedding has 6 columns"),
        ({"extra": ("entropy",)}, "'entropy'"),
    ],
)
def test_invalid_arguments_are_rejected(options, message):
    arguments = {"hidden": np.zeros((3, 4)), "unembedding": np.zeros((4, 6)), "tokens": np.zeros(3, int)} | options
    with pytest.raises(ValueError, match=message):
        token_stats(**arguments)


def test_mismatched_logits_and_tokens_are_rejected():
    with pytest.raises(ValueError, match=r"logits have shape \(3, 5\) but tokens \(2,\)"):
        token_stats_from_logits(np.zeros((3, 5)), np.zeros(2, int))
