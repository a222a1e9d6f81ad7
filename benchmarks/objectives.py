"""What losses cost beside the statistics that they read: `python -m benchmarks.objectives [--quick] --json FILE`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from benchmarks import rows
from benchmarks.rows import Row
from shiq_jax.objectives import OBJECTIVES, Example, Objective, TokenStats, token_stats

TOKENS, VOCABULARY, FEATURES = 1024, 151_936, 1536
LONG = (64, 4096)
COPIES = 30


def measure(quick: bool) -> tuple[list[Row], dict]:
    """The rows, and seconds of the statistics and of every objective; quick: a small vocabulary."""
    kernel = seconds(*statistics_step(VOCABULARY // 64 if quick else VOCABULARY), repeats=3)
    costs = {name: seconds(*objective_step(objective)) for name, objective in OBJECTIVES.items()}
    worst = max(costs, key=costs.get)
    loss, copies = seconds(*long_step()), seconds(*copying())
    found = [
        Row("objective_over_statistics_worst", costs[worst] / kernel, "", 0.02, True,
            f"{worst}: {costs[worst] * 1e3:.2f} ms; statistics: {kernel:.2f} s"),
        Row("shiq_over_30_copies", loss / copies, "", 1.5, True, f"{loss * 1e3:.1f} ms, {copies * 1e3:.1f} ms"),
    ]  # fmt: skip
    return found, {"statistics": kernel, "objectives": costs}


def seconds(function: Callable, *args, repeats: int = 30) -> float:
    """The median of several calls of a jitted function, after one that compiles it."""
    jax.block_until_ready(function(*args))
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(function(*args))
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def statistics_step(vocabulary: int):
    """Forward and backward of the statistics kernel, and its arguments."""
    hidden = jax.random.normal(jax.random.key(0), (TOKENS, FEATURES))
    matrix = 0.02 * jax.random.normal(jax.random.key(1), (FEATURES, vocabulary))
    tokens = jax.random.randint(jax.random.key(2), (TOKENS,), 0, vocabulary)

    def total(hidden, matrix):
        stats = token_stats(hidden, matrix, tokens)
        return jnp.sum(stats.logp) + jnp.sum(stats.lse)

    return jax.jit(jax.value_and_grad(total, argnums=(0, 1))), hidden, matrix


def objective_step(objective: Objective):
    """Loss and gradient with respect to statistics of as many tokens in one example."""
    # What couples examples has two sequences in each.
    members = 2 if objective.couple else {"trajectory": 1, "pair": 2, "group": 8}[objective.unit]
    given = example(objective, members, TOKENS // members)
    if objective.couple is not None:
        given = given._replace(coupled=coupled(objective, given))

    def total(learned):
        policy, values = learned
        return objective.loss(given._replace(policy=policy, values=values)).value

    return jax.jit(jax.value_and_grad(total)), (given.policy, given.values)


def example(objective: Objective, members: int, length: int) -> Example:
    """Random statistics, rewards and what heads say, all of it actions."""
    keys = iter(jax.random.split(jax.random.key(0), 32))
    shape = (members, length)

    def stats() -> TokenStats:
        return TokenStats(-jnp.exp(jax.random.normal(next(keys), shape)), 10 + jax.random.normal(next(keys), shape))

    values = {
        name: stats() if kind == "q" else jax.random.normal(next(keys), shape) for name, kind in objective.heads.items()
    }
    values |= {f"target_{name}": stats() for name in objective.target_heads}
    reference = stats()
    # Near the reference, where no loss is flat.
    policy = TokenStats(reference.logp + 1e-4 * jax.random.normal(next(keys), shape), reference.lse)
    return Example(
        policy=policy if objective.trains_policy else None, references={"reference": reference},
        action_mask=jnp.ones(shape, bool), rewards=jax.random.normal(next(keys), shape), values=values or None,
        labels=jnp.arange(members) == 0,
    )  # fmt: skip


def coupled(objective: Objective, given: Example):
    """What the couple of a batch of this one example makes of it."""
    summary = jax.tree.map(lambda leaf: leaf[None], objective.couple.summary(given))
    return jax.tree.map(lambda leaf: leaf[0], objective.couple.combine(summary, jnp.ones(1)))


def long_step():
    """ShiQ's loss and gradient of a large batch."""
    given = example(OBJECTIVES["shiq"], *LONG)

    def total(policy):
        return OBJECTIVES["shiq"].loss(given._replace(policy=policy)).value

    return jax.jit(jax.value_and_grad(total)), given.policy


def copying():
    """As many arrays of the large batch's size, each read and written once."""
    return jax.jit(lambda x: [x + number for number in range(COPIES)]), jnp.zeros(LONG)


if __name__ == "__main__":
    rows.command("objectives", __doc__, measure)
