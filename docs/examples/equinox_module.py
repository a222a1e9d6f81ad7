"""SimPO, a reference-free loss, with an Equinox module (`pip install equinox`).

python docs/examples/equinox_module.py
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

from shiq_jax.objectives import simpo_loss, token_stats_from_logits

VOCABULARY, LENGTH, PAIRS = 16, 8, 128


class Model(eqx.Module):
    """Predict each token from the previous one."""

    embed: eqx.nn.Embedding
    layers: eqx.nn.MLP

    def __init__(self, key):
        first, second = jax.random.split(key)
        self.embed = eqx.nn.Embedding(VOCABULARY, 16, key=first)
        self.layers = eqx.nn.MLP(16, VOCABULARY, 32, 1, key=second)

    def logp(self, tokens):
        """Log-probability of a sequence, in nats."""
        previous = jnp.concatenate([jnp.zeros(1, tokens.dtype), tokens[:-1]])
        logits = jax.vmap(lambda token: self.layers(self.embed(token)))(previous)
        return jnp.sum(token_stats_from_logits(logits, tokens).logp)


def main() -> tuple[float, float]:
    """Accuracy on held-out pairs before and after training; the chosen sequence of a pair is sorted."""
    model = Model(jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (2 * PAIRS, LENGTH), 0, VOCABULARY)
    chosen, rejected = jnp.sort(tokens, axis=1), tokens
    optimizer = optax.adam(3e-3)
    opt_state = optimizer.init(eqx.filter(model, eqx.is_array))

    def logps(model, sequences):
        return jax.vmap(model.logp)(sequences)

    @eqx.filter_jit
    def update(model, opt_state):
        def loss(model):
            chosen_logp, rejected_logp = logps(model, chosen[:PAIRS]), logps(model, rejected[:PAIRS])
            return jnp.mean(simpo_loss(chosen_logp, rejected_logp, LENGTH, LENGTH, beta=2.0, margin=0.5))

        updates, opt_state = optimizer.update(eqx.filter_grad(loss)(model), opt_state)
        return eqx.apply_updates(model, updates), opt_state

    def accuracy(model):
        return float(jnp.mean(logps(model, chosen[PAIRS:]) > logps(model, rejected[PAIRS:])))

    before = accuracy(model)
    for _ in range(100):
        model, opt_state = update(model, opt_state)
    after = accuracy(model)
    print(f"accuracy on held-out pairs: {before:.2f} before, {after:.2f} after")
    return before, after


if __name__ == "__main__":
    main()
