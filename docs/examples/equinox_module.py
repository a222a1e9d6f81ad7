"""A loss without reference, SimPO, on an Equinox module (`pip install equinox`).

python docs/examples/equinox_module.py
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

from shiq_jax.objectives import simpo_loss, token_stats_from_logits

VOCABULARY, LENGTH, PAIRS = 16, 8, 128


class Model(eqx.Module):
    """Predicts each token from the one before it."""

    embed: eqx.nn.Embedding
    layers: eqx.nn.MLP

    def __init__(self, key):
        first, second = jax.random.split(key)
        self.embed = eqx.nn.Embedding(VOCABULARY, 16, key=first)
        self.layers = eqx.nn.MLP(16, VOCABULARY, 32, 1, key=second)

    def logp(self, tokens):
        """The log-probability of a sequence, in nats."""
        before = jnp.concatenate([jnp.zeros(1, tokens.dtype), tokens[:-1]])
        logits = jax.vmap(lambda token: self.layers(self.embed(token)))(before)
        return jnp.sum(token_stats_from_logits(logits, tokens).logp)


def main() -> tuple[float, float]:
    """Share of held-out pairs whose better sequence is the likelier before and after; better is what ascends more."""
    model = Model(jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (2 * PAIRS, LENGTH), 0, VOCABULARY)
    chosen, rejected = jnp.sort(tokens, axis=1), tokens
    optimizer = optax.adam(3e-3)
    state = optimizer.init(eqx.filter(model, eqx.is_array))

    def logps(model, sequences):
        return jax.vmap(model.logp)(sequences)

    @eqx.filter_jit
    def update(model, state):
        def loss(model):
            sums = logps(model, chosen[:PAIRS]), logps(model, rejected[:PAIRS])
            return jnp.mean(simpo_loss(*sums, LENGTH, LENGTH, beta=2.0, margin=0.5))

        updates, state_ = optimizer.update(eqx.filter_grad(loss)(model), state)
        return eqx.apply_updates(model, updates), state_

    def accuracy(model):
        return float(jnp.mean(logps(model, chosen[PAIRS:]) > logps(model, rejected[PAIRS:])))

    before = accuracy(model)
    for _ in range(100):
        model, state = update(model, state)
    after = accuracy(model)
    print(f"held-out pairs told apart: {before:.2f} before, {after:.2f} after")
    return before, after


if __name__ == "__main__":
    main()
