"""Scaling exponents of memory and compile time: `python -m benchmarks.growth [--quick] --json FILE`.

The exponents are fitted to the compiler's memory analysis and to compile times; no program is executed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import rows
from benchmarks.rows import Row
from shiq_jax.models import DecoderConfig, Model
from shiq_jax.objectives import OBJECTIVES, Example, TokenStats, token_stats
from shiq_jax.replay import Batch
from shiq_jax.training.optimizers import Optimizer
from shiq_jax.training.state import init_state
from shiq_jax.training.update import make_update

SMALL = DecoderConfig(
    vocab_size=512, hidden_size=128, intermediate_size=384, num_layers=4, num_heads=4, max_positions=8192
)


def measure(quick: bool = False) -> tuple[list[Row], dict[str, list]]:
    """Rows of the three exponents, and the measurements behind each row; `quick` uses two small sizes per exponent."""
    benchmarks = {
        "growth_memory_T": (memory_in_tokens, ((128, 256),), 1.05),
        "growth_memory_V": (memory_in_vocabulary, ((32_768, 65_536),), 0.05),
        "growth_compile_depth": (compile_time_in_depth, ((2, 4), 1), 0.1),
    }
    results, details = [], {}
    for name, (fit, quick_args, goal) in benchmarks.items():
        slope, details[name] = fit(*quick_args) if quick else fit()
        results.append(Row(name, slope, "", goal, at_most=True, note="exponent"))
    return results, details


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """Slope of a least-squares line through (log size, log cost)."""
    return float(np.polyfit(np.log(sizes), np.log(costs), 1)[0])


def memory_in_tokens(lengths: Sequence[int] = (256, 512, 1024, 2048, 4096, 8192)) -> tuple[float, list[int]]:
    """Exponent of the update step's temporary memory in the row length, and the bytes at each length."""
    sizes = [_compiled_update(SMALL, length)[0].memory_analysis().temp_size_in_bytes for length in lengths]
    return exponent(lengths, sizes), sizes


def memory_in_vocabulary(sizes: Sequence[int] = (32_768, 65_536, 131_072, 262_144)) -> tuple[float, list[int]]:
    """Exponent of the token statistics' temporary memory in the vocabulary size, and the bytes at each size.

    The accumulator of the unembedding's gradient is temporary memory of [D, V] floats and is subtracted.
    """
    temporary = []
    for vocabulary in sizes:

        def total(hidden, unembedding, tokens):
            stats = token_stats(hidden, unembedding, tokens)
            return jnp.sum(stats.logp) + jnp.sum(stats.lse)

        # With 4,096 positions the memory budget determines the chunk size at every vocabulary.
        shapes = (_array(4096, 256), _array(256, vocabulary), _array(4096, dtype=jnp.int32))
        compiled = jax.jit(jax.value_and_grad(total, argnums=(0, 1))).lower(*shapes).compile()
        gradient = 4 * 256 * vocabulary
        temporary.append(compiled.memory_analysis().temp_size_in_bytes - gradient)
    return exponent(sizes, temporary), temporary


def compile_time_in_depth(depths: Sequence[int] = (8, 16, 32), repeats: int = 3) -> tuple[float, list[float]]:
    """Exponent of the update step's compile time in the number of layers, and the median seconds at each depth."""
    seconds = [
        float(np.median([_compiled_update(dataclasses.replace(SMALL, num_layers=n), 128)[1] for _ in range(repeats)]))
        for n in depths
    ]
    return exponent(depths, seconds), seconds


def _compiled_update(config: DecoderConfig, length: int, remat: str = "dots"):
    """Compile the DPO update step for one row of `length` tokens; return the program and the seconds it took."""
    model, objective = Model.from_config(config, remat=remat), OBJECTIVES["dpo"]
    optimizer = Optimizer(schedule="constant").build(10)
    state = init_state(model, model.abstract_params(), optimizer)
    lowered = make_update(model, objective, optimizer).lower(state, _pair_batch(length))
    start = time.perf_counter()
    with _compilation_cache_disabled():
        compiled = lowered.compile()
    return compiled, time.perf_counter() - start


@contextlib.contextmanager
def _compilation_cache_disabled() -> Iterator[None]:
    enabled = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)


def _pair_batch(length: int) -> Batch:
    """Abstract batch of one preference pair: a prompt of half the row and two completions of a quarter."""
    answer = length // 4
    stats = TokenStats(*(_array(1, 1, 2, answer),) * 2)
    return Batch(
        tokens=_array(1, length, dtype=jnp.int32), positions=_array(1, length, dtype=jnp.int32),
        intervals=_array(1, length, 2, dtype=jnp.int32), predictors=_array(1, 2 * answer, dtype=jnp.int32),
        targets=_array(1, 2 * answer, dtype=jnp.int32), gather=_array(1, 1, 2, answer, dtype=jnp.int32),
        example=Example(
            action_mask=_array(1, 1, 2, answer, dtype=jnp.bool_), rewards=_array(1, 1, 2, answer),
            references={"reference": stats},
        ),
        real=_array(1, 1, dtype=jnp.bool_),
    )  # fmt: skip


def _array(*shape: int, dtype: Callable = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


if __name__ == "__main__":
    rows.run_benchmark("growth", __doc__, measure)
