"""Cost of each objective relative to its token statistics: `python -m benchmarks.objectives [--quick] --json FILE`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from benchmarks.rows import Row, run_benchmark
from shiq_jax.objectives import OBJECTIVES, Example, Objective, TokenStats, token_stats

TOKENS, VOCABULARY, HIDDEN_SIZE = 1024, 151_936, 1536
LARGE_SHAPE = (64, 4096)
COPIES = 30


def measure(quick: bool) -> tuple[list[Row], dict]:
    """Rows, and seconds of the token statistics and of every objective; `quick` uses a small vocabulary."""
    kernel = median_seconds(*statistics_step(VOCABULARY // 64 if quick else VOCABULARY), repeats=3)
    costs = {name: median_seconds(*objective_step(objective)) for name, objective in OBJECTIVES.items()}
    worst = max(costs, key=costs.get)
    loss, copies = median_seconds(*large_shiq_step()), median_seconds(*copy_step())
    rows = [
        Row("objective_over_statistics_worst", costs[worst] / kernel, "", 0.02, True,
            f"{worst}: {costs[worst] * 1e3:.2f} ms; statistics: {kernel:.2f} s"),
        Row("shiq_over_30_copies", loss / copies, "", 1.5, True, f"{loss * 1e3:.1f} ms, {copies * 1e3:.1f} ms"),
    ]  # fmt: skip
    return rows, {"statistics": kernel, "objectives": costs}


def median_seconds(function: Callable, *args, repeats: int = 30) -> float:
    """Median time of a jitted function's calls, after one call that compiles it."""
    jax.block_until_ready(function(*args))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(function(*args))
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def statistics_step(vocabulary: int):
    """Jitted forward and backward pass of the token statistics, and its arguments."""
    hidden = jax.random.normal(jax.random.key(0), (TOKENS, HIDDEN_SIZE))
    matrix = 0.02 * jax.random.normal(jax.random.key(1), (HIDDEN_SIZE, vocabulary))
    tokens = jax.random.randint(jax.random.key(2), (TOKENS,), 0, vocabulary)

    def total(hidden, matrix):
        stats = token_stats(hidden, matrix, tokens)
        return jnp.sum(stats.logp) + jnp.sum(stats.lse)

    return jax.jit(jax.value_and_grad(total, argnums=(0, 1))), hidden, matrix


def objective_step(objective: Objective):
    """Jitted loss and gradient of one example with `TOKENS` tokens, and the statistics to differentiate."""
    # Coupled objectives have two sequences per example.
    sequences = 2 if objective.couple else {"trajectory": 1, "pair": 2, "group": 8}[objective.unit]
    inputs = random_example(objective, sequences, TOKENS // sequences)
    if objective.couple is not None:
        inputs = inputs._replace(coupled=coupled_summary(objective, inputs))

    def total(differentiable):
        policy, values = differentiable
        return objective.loss(inputs._replace(policy=policy, values=values)).value

    return jax.jit(jax.value_and_grad(total)), (inputs.policy, inputs.values)


def random_example(objective: Objective, sequences: int, length: int) -> Example:
    """An example with random statistics, rewards and head outputs in which every token is an action."""
    keys = iter(jax.random.split(jax.random.key(0), 32))
    shape = (sequences, length)

    def stats() -> TokenStats:
        return TokenStats(-jnp.exp(jax.random.normal(next(keys), shape)), 10 + jax.random.normal(next(keys), shape))

    values = {
        name: stats() if kind == "q" else jax.random.normal(next(keys), shape) for name, kind in objective.heads.items()
    }
    values |= {f"target_{name}": stats() for name in objective.target_heads}
    reference = stats()
    # Close to the reference no loss saturates, so every gradient is nonzero.
    policy = TokenStats(reference.logp + 1e-4 * jax.random.normal(next(keys), shape), reference.lse)
    return Example(
        policy=policy if objective.trains_policy else None, references={"reference": reference},
        action_mask=jnp.ones(shape, bool), rewards=jax.random.normal(next(keys), shape), values=values or None,
        labels=jnp.arange(sequences) == 0,
    )  # fmt: skip


def coupled_summary(objective: Objective, inputs: Example):
    """The combined summary of a batch that holds only this example."""
    summary = jax.tree.map(lambda leaf: leaf[None], objective.couple.summary(inputs))
    return jax.tree.map(lambda leaf: leaf[0], objective.couple.combine(summary, jnp.ones(1)))


def large_shiq_step():
    """Jitted loss and gradient of ShiQ on a large batch, and its argument."""
    inputs = random_example(OBJECTIVES["shiq"], *LARGE_SHAPE)

    def total(policy):
        return OBJECTIVES["shiq"].loss(inputs._replace(policy=policy)).value

    return jax.jit(jax.value_and_grad(total)), inputs.policy


def copy_step():
    """Jitted function that reads and writes `COPIES` arrays of the large batch's shape, and its argument."""
    return jax.jit(lambda x: [x + number for number in range(COPIES)]), jnp.zeros(LARGE_SHAPE)


if __name__ == "__main__":
    run_benchmark("objectives", __doc__, measure)
