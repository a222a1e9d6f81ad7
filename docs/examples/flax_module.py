"""DPO with a Flax NNX module and `token_stats`, which does not materialize the logits.

python docs/examples/flax_module.py
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from shiq_jax.objectives import dpo_loss, token_stats

VOCABULARY, LENGTH, PAIRS, FEATURES = 32, 8, 512, 16


class Model(nnx.Module):
    """A GRU with an unembedding matrix [features, vocabulary]."""

    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(VOCABULARY, FEATURES, rngs=rngs)
        self.cell = nnx.GRUCell(FEATURES, FEATURES, rngs=rngs)
        self.head = nnx.Param(0.3 * jax.random.normal(rngs.params(), (FEATURES, VOCABULARY)))

    def hidden(self, tokens):
        """Hidden states [T, features]; entry t depends on the tokens before t."""
        inputs = self.embed(jnp.concatenate([jnp.zeros(1, tokens.dtype), tokens[:-1]]))
        carry, states = jnp.zeros(FEATURES), []
        for x in inputs:
            carry, state = self.cell(carry, x)
            states.append(state)
        return jnp.stack(states)


def logp(model, tokens):
    """Log-probability of a sequence, in nats."""
    return jnp.sum(token_stats(model.hidden(tokens), model.head[...], tokens).logp)


def main() -> tuple[float, float]:
    """Accuracy on held-out pairs before and after training; the chosen sequence has the larger token sum."""
    model = Model(nnx.Rngs(0))
    pairs = jax.random.randint(jax.random.key(1), (2 * PAIRS, 2, LENGTH), 0, VOCABULARY)
    order = jnp.argsort(-pairs.sum(-1), axis=1)
    chosen, rejected = jnp.moveaxis(jnp.take_along_axis(pairs, order[..., None], axis=1), 1, 0)
    logps = nnx.jit(lambda model, tokens: jax.vmap(lambda sequence: logp(model, sequence))(tokens))
    reference = logps(model, chosen), logps(model, rejected)
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)

    @nnx.jit
    def update(model, optimizer):
        def loss(model):
            logratios = (logps(model, side[:PAIRS]) - ref[:PAIRS] for side, ref in zip((chosen, rejected), reference))
            return jnp.mean(dpo_loss(*logratios, beta=0.1))

        optimizer.update(model, nnx.grad(loss)(model))

    def accuracy():
        logratios = [logps(model, side[PAIRS:]) - ref[PAIRS:] for side, ref in zip((chosen, rejected), reference)]
        return float(jnp.mean((logratios[0] > logratios[1]) + 0.5 * (logratios[0] == logratios[1])))

    before = accuracy()
    for _ in range(100):
        update(model, optimizer)
    after = accuracy()
    print(f"accuracy on held-out pairs: {before:.2f} before, {after:.2f} after")
    return before, after


if __name__ == "__main__":
    main()
