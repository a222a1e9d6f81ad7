"""FLOP counts: executed by a traced program, needed by a training step, and the peak rate of the machine."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from shiq_jax.models import DecoderConfig


def executed_flops(function, *args) -> float:
    """FLOPs of all matrix products of a function, 2 per multiply-add; scan bodies count once per iteration."""
    return _jaxpr_flops(jax.make_jaxpr(function)(*args).jaxpr)


def _jaxpr_flops(jaxpr) -> float:
    total = 0.0
    for equation in jaxpr.eqns:
        iterations = equation.params["length"] if equation.primitive.name == "scan" else 1
        if equation.primitive.name == "dot_general":
            total += _dot_flops(equation)
        else:
            total += iterations * sum(map(_jaxpr_flops, _nested_jaxprs(equation.params.values())))
    return total


def _nested_jaxprs(values):
    for value in values:
        if hasattr(value, "eqns"):
            yield value
        elif hasattr(value, "jaxpr"):
            yield from _nested_jaxprs([value.jaxpr])
        elif isinstance(value, (tuple, list)):
            yield from _nested_jaxprs(value)


def _dot_flops(equation) -> float:
    (contracting_axes, _), _ = equation.params["dimension_numbers"]
    inner = math.prod(equation.invars[0].aval.shape[axis] for axis in contracting_axes)
    return 2.0 * inner * equation.outvars[0].aval.size


def needed_flops(config: DecoderConfig, tokens: int, actions: int, pairs_attended: int) -> float:
    """FLOPs of a step's forward and backward pass without padding, recomputation of layers, or repeated prefixes.

    Args:
        config: decoder configuration.
        tokens: distinct tokens of the step, without padding.
        actions: distinct actions; each runs through the unembedding four times (forward, recomputed logits, two
            products of the backward pass).
        pairs_attended: visible (query, key) pairs, summed over the tokens.
    """
    d, heads = config.hidden_size, config.num_heads * config.head_dim
    kv = config.num_kv_heads * config.head_dim
    layer = 2 * d * heads + 2 * d * kv + 3 * d * config.intermediate_size
    matrices = 6.0 * config.num_layers * layer * tokens
    attention = 12.0 * config.num_layers * heads * pairs_attended
    return matrices + attention + 8.0 * d * config.vocab_size * actions


SHAPES = ((1024, 1536, 576), (1024, 1024, 1024), (2048, 2048, 2048))


def matmul_peak(repeats: int = 15, shapes: Sequence[tuple[int, int, int]] = SHAPES) -> float:
    """FLOP/s of the fastest float32 matrix product among `shapes`; each shape is timed `repeats` times."""
    best = 0.0
    for m, k, n in shapes:
        left, right = (jax.random.normal(jax.random.key(0), shape, jnp.float32) for shape in ((m, k), (k, n)))
        product = jax.jit(jnp.matmul)
        product(left, right).block_until_ready()
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            product(left, right).block_until_ready()
            times.append(time.perf_counter() - start)
        best = max(best, 2.0 * m * k * n / statistics.median(times))
    return best
