"""ShiQ with a bigram model in plain JAX: a table of logits with one row per previous token.

python docs/examples/plain_jax.py
"""

import jax
import jax.numpy as jnp

from shiq_jax.objectives import shiq_loss, token_stats_from_logits

VOCABULARY, LENGTH, SEQUENCES, BETA = 8, 6, 512, 0.5


def logits_of(table, tokens):
    """Logits [T, V]; row t predicts token t from the previous token, the first one from token 0."""
    previous = jnp.concatenate([jnp.zeros(1, tokens.dtype), tokens[:-1]])
    return table[previous]


def loss(table, reference, tokens, rewards):
    """ShiQ loss of one sequence in which every token is an action."""
    policy = token_stats_from_logits(logits_of(table, tokens), tokens)
    return shiq_loss(policy, reference, rewards, jnp.ones(LENGTH, bool), beta=BETA)


def main() -> tuple[float, float]:
    """Mean reward of samples before and after training on samples of the reference; repeated tokens cost 1."""
    initial = jax.random.normal(jax.random.key(0), (VOCABULARY, VOCABULARY))

    def sample(table, key):
        def step(previous, key):
            token = jax.random.categorical(key, table[previous])
            return token, token

        return jax.lax.scan(step, jnp.int32(0), jax.random.split(key, LENGTH))[1]

    def reward(tokens):
        return jnp.zeros(LENGTH).at[1:].set(-1.0 * (tokens[1:] == tokens[:-1]))

    sample_batch = jax.jit(jax.vmap(sample, (None, 0)))
    tokens = sample_batch(initial, jax.random.split(jax.random.key(1), SEQUENCES))
    rewards = jax.vmap(reward)(tokens)
    # Training needs only two floats per token of the reference, computed once.
    reference = jax.vmap(lambda tokens: token_stats_from_logits(logits_of(initial, tokens), tokens))(tokens)

    def batch_loss(table):
        return jnp.mean(jax.vmap(loss, (None, 0, 0, 0))(table, reference, tokens, rewards))

    step = jax.jit(lambda table: table - 0.5 * jax.grad(batch_loss)(table))
    table = initial
    for _ in range(300):
        table = step(table)
    keys = jax.random.split(jax.random.key(2), 4096)
    before, after = (
        float(jnp.mean(jax.vmap(reward)(sample_batch(policy, keys)).sum(1))) for policy in (initial, table)
    )
    print(f"mean reward {before:.3f} before, {after:.3f} after")
    return before, after


if __name__ == "__main__":
    main()
