"""Validation of option values before any data is read, by tracing the loss on an abstract example."""

import jax
import jax.numpy as jnp

from shiq_jax.objectives.types import Example, Objective, TokenStats
from shiq_jax.objectives.validation import check_positive


def check_options(objective: Objective) -> None:
    """Raise ValueError if the objective rejects the options bound to it.

    Traces the loss without compiling it and without initializing a backend.
    """
    check_positive("beta", objective.beta)
    if not 0 < objective.polyak <= 1:
        raise ValueError(f"polyak is {objective.polyak} but must lie in (0, 1].")

    def value(example: Example):
        if objective.couple is not None:
            summaries = jax.vmap(objective.couple.summary)(jax.tree.map(lambda leaf: leaf[None], example))
            coupled = objective.couple.combine(summaries, jnp.ones(1))
            example = example._replace(coupled=jax.tree.map(lambda leaf: leaf[0], coupled))
        return objective.loss(example).value

    jax.eval_shape(value, abstract_example(objective))


def abstract_example(objective: Objective, tokens: int = 2) -> Example:
    """Shapes and dtypes of an example of an objective: one sequence for a trajectory, two for a pair or group."""
    sequences = 1 if objective.unit == "trajectory" else 2
    floats = jax.ShapeDtypeStruct((sequences, tokens), jnp.float32)
    stats = TokenStats(floats, floats, floats)
    values = {name: floats if kind == "value" else stats for name, kind in objective.heads.items()}
    values |= {f"target_{name}": stats for name in objective.target_heads}
    return Example(
        policy=stats, references={"reference": stats}, action_mask=jax.ShapeDtypeStruct((sequences, tokens), jnp.bool_),
        rewards=floats, values=values or None, labels=jax.ShapeDtypeStruct((sequences,), jnp.bool_),
    )  # fmt: skip
