"""ShiQ on a model that is nothing but arrays and a function: a table of logits, one row per token before.

python docs/examples/plain_jax.py
"""

import jax
import jax.numpy as jnp

from shiq_jax.objectives import shiq_loss, token_stats_from_logits

VOCABULARY, LENGTH, SEQUENCES, BETA = 8, 6, 512, 0.5


def logits_of(table, tokens):
    """[T, V]: row t predicts token t; the first token is predicted from token 0."""
    before = jnp.concatenate([jnp.zeros(1, tokens.dtype), tokens[:-1]])
    return table[before]


def loss(table, reference, tokens, rewards):
    """ShiQ of one sequence whose tokens are all the model's own."""
    policy = token_stats_from_logits(logits_of(table, tokens), tokens)
    return shiq_loss(policy, reference, rewards, jnp.ones(LENGTH, bool), beta=BETA)


def main() -> tuple[float, float]:
    """Mean reward of samples before and after: tokens should not repeat. The data come from the reference alone."""
    start = jax.random.normal(jax.random.key(0), (VOCABULARY, VOCABULARY))

    def sample(table, key):
        def step(before, key):
            token = jax.random.categorical(key, table[before])
            return token, token

        return jax.lax.scan(step, jnp.int32(0), jax.random.split(key, LENGTH))[1]

    def reward(tokens):
        return jnp.zeros(LENGTH).at[1:].set(-1.0 * (tokens[1:] == tokens[:-1]))

    draw = jax.jit(jax.vmap(sample, (None, 0)))
    tokens = draw(start, jax.random.split(jax.random.key(1), SEQUENCES))
    rewards = jax.vmap(reward)(tokens)
    # Computed once, and kept: the two floats per token are all that is ever needed of the reference.
    reference = jax.vmap(lambda tokens: token_stats_from_logits(logits_of(start, tokens), tokens))(tokens)

    mean = lambda table: jnp.mean(jax.vmap(loss, (None, 0, 0, 0))(table, reference, tokens, rewards))  # noqa: E731
    step = jax.jit(lambda table: table - 0.5 * jax.grad(mean)(table))
    table = start
    for _ in range(300):
        table = step(table)
    fresh = jax.random.split(jax.random.key(2), 4096)
    before, after = (float(jnp.mean(jax.vmap(reward)(draw(each, fresh)).sum(1))) for each in (start, table))
    print(f"mean reward {before:.3f} before, {after:.3f} after")
    return before, after


if __name__ == "__main__":
    main()
