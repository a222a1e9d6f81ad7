"""Floating-point operations: those that a program executes, those that a step needs, and what the machine can do."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from shiq_jax.models import DecoderConfig


def executed(function, *args) -> float:
    """Operations in matrix products of a traced function: 2 per multiply-add, loops counted as often as they run."""
    return _of(jax.make_jaxpr(function)(*args).jaxpr)


def _of(jaxpr) -> float:
    total = 0.0
    for equation in jaxpr.eqns:
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        if equation.primitive.name == "dot_general":
            total += _dot(equation)
        else:
            total += times * sum(map(_of, _inner(equation.params.values())))
    return total


def _inner(values):
    for value in values:
        if hasattr(value, "eqns"):
            yield value
        elif hasattr(value, "jaxpr"):
            yield from _inner([value.jaxpr])
        elif isinstance(value, (tuple, list)):
            yield from _inner(value)


def _dot(equation) -> float:
    (contracted, _), _ = equation.params["dimension_numbers"]
    inner = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
    return 2.0 * inner * equation.outvars[0].aval.size


def needed(config: DecoderConfig, tokens: int, actions: int, pairs_attended: int) -> float:
    """Of a step's forward and backward: every token once, every distinct action once through the vocabulary.

    Args:
        config: of the decoder.
        tokens: distinct tokens of the step, padding not counted.
        actions: distinct actions; the head costs a forward, a recomputation of the logits, and two products backward.
        pairs_attended: (query, key) pairs that the interval rule lets see each other, summed over the tokens.
    """
    d, heads = config.hidden_size, config.num_heads * config.head_dim
    kv = config.num_kv_heads * config.head_dim
    layer = 2 * d * heads + 2 * d * kv + 3 * d * config.intermediate_size
    matrices = 6.0 * config.num_layers * layer * tokens
    attention = 12.0 * config.num_layers * heads * pairs_attended
    return matrices + attention + 8.0 * d * config.vocab_size * actions


SHAPES = ((1024, 1536, 576), (1024, 1024, 1024), (2048, 2048, 2048))


def matmul_peak(repeats: int = 15, shapes: Sequence[tuple[int, int, int]] = SHAPES) -> float:
    """Operations per second of the best float32 matrix product found, the median of several runs of each shape."""
    best = 0.0
    for m, k, n in shapes:
        left, right = (jax.random.normal(jax.random.key(0), shape, jnp.float32) for shape in ((m, k), (k, n)))
        product = jax.jit(jnp.matmul)
        product(left, right).block_until_ready()
        times = []
        for _ in range(repeats):
            began = time.perf_counter()
            product(left, right).block_until_ready()
            times.append(time.perf_counter() - began)
        best = max(best, 2.0 * m * k * n / statistics.median(times))
    return best
