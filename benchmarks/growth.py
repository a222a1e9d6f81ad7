"""How memory and compile time grow: `python -m benchmarks.growth [--quick] --json FILE`.

Exponents are fitted to what the compiler says; nothing is run.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence

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
    """The rows of the three exponents, and by row what they are fitted to.

    quick: two small sizes each.
    """
    kinds = {
        "growth_memory_T": (memory_in_tokens, ((128, 256),), 1.05),
        "growth_memory_V": (memory_in_vocabulary, ((32_768, 65_536),), 0.05),
        "growth_compile_depth": (compile_time_in_depth, ((2, 4), 1), 0.1),
    }
    found, details = [], {}
    for name, (fit, small, goal) in kinds.items():
        slope, details[name] = fit(*small) if quick else fit()
        found.append(Row(name, slope, "", goal, at_most=True, note="exponent"))
    return found, details


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """The slope of a straight line through log(cost) over log(size)."""
    return float(np.polyfit(np.log(sizes), np.log(costs), 1)[0])


def memory_in_tokens(lengths: Sequence[int] = (256, 512, 1024, 2048, 4096, 8192)) -> tuple[float, list[int]]:
    """Exponent of the update step's temporary memory in the tokens of a row, and the bytes."""
    found = [_compiled(SMALL, length)[0].memory_analysis().temp_size_in_bytes for length in lengths]
    return exponent(lengths, found), found


def memory_in_vocabulary(sizes: Sequence[int] = (32_768, 65_536, 131_072, 262_144)) -> tuple[float, list[int]]:
    """Exponent of the temporary memory of the statistics' forward and backward in the vocabulary, and the bytes.

    The gradient of the unembedding is summed in memory of its own, which is taken off.
    """
    found = []
    for vocabulary in sizes:

        def total(hidden, unembedding, tokens):
            stats = token_stats(hidden, unembedding, tokens)
            return jnp.sum(stats.logp) + jnp.sum(stats.lse)

        # So many positions that the budget of the logits' chunk, and not their number, is what limits it throughout.
        shapes = (_array(4096, 256), _array(256, vocabulary), _array(4096, dtype=jnp.int32))
        compiled = jax.jit(jax.value_and_grad(total, argnums=(0, 1))).lower(*shapes).compile()
        gradient = 4 * 256 * vocabulary
        found.append(compiled.memory_analysis().temp_size_in_bytes - gradient)
    return exponent(sizes, found), found


def compile_time_in_depth(depths: Sequence[int] = (8, 16, 32), repeats: int = 3) -> tuple[float, list[float]]:
    """Exponent of the update step's compile time in the number of layers, and the median seconds."""
    found = [
        float(np.median([_compiled(dataclasses.replace(SMALL, num_layers=depth), 128)[1] for _ in range(repeats)]))
        for depth in depths
    ]
    return exponent(depths, found), found


def _compiled(config: DecoderConfig, length: int, remat: str = "dots"):
    """The DPO update step of a row with one pair whose prompt is half of it, compiled anew; and the seconds it took."""
    model, objective = Model.from_config(config, remat=remat), OBJECTIVES["dpo"]
    rule = Optimizer(schedule="constant").build(10)
    state = init_state(model, model.abstract_params(), rule)
    step = make_update(model, objective, rule).lower(state, _pair(length))
    began = time.perf_counter()
    with _no_cache():
        compiled = step.compile()
    return compiled, time.perf_counter() - began


class _no_cache:
    """Nothing is taken from a persistent compilation cache."""

    def __enter__(self) -> None:
        self._before = jax.config.jax_enable_compilation_cache
        jax.config.update("jax_enable_compilation_cache", False)

    def __exit__(self, *_: object) -> None:
        jax.config.update("jax_enable_compilation_cache", self._before)


def _pair(length: int) -> Batch:
    answer = length // 4
    statistics = TokenStats(*(_array(1, 1, 2, answer),) * 2)
    return Batch(
        tokens=_array(1, length, dtype=jnp.int32), positions=_array(1, length, dtype=jnp.int32),
        intervals=_array(1, length, 2, dtype=jnp.int32), predictors=_array(1, 2 * answer, dtype=jnp.int32),
        targets=_array(1, 2 * answer, dtype=jnp.int32), gather=_array(1, 1, 2, answer, dtype=jnp.int32),
        example=Example(
            action_mask=_array(1, 1, 2, answer, dtype=jnp.bool_), rewards=_array(1, 1, 2, answer),
            references={"reference": statistics},
        ),
        real=_array(1, 1, dtype=jnp.bool_),
    )  # fmt: skip


def _array(*shape: int, dtype: Callable = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


if __name__ == "__main__":
    rows.command("growth", __doc__, measure)
