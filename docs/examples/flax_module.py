"""DPO on a Flax NNX module, with the statistics kernel that never holds the logits of a sequence.

python docs/examples/flax_module.py
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from shiq_jax.objectives import dpo_loss, token_stats

VOCABULARY, LENGTH, PAIRS, FEATURES = 32, 8, 512, 16


class Model(nnx.Module):
    """A gated recurrence over embeddings; its unembedding is a matrix [features, vocabulary]."""

    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(VOCABULARY, FEATURES, rngs=rngs)
        self.cell = nnx.GRUCell(FEATURES, FEATURES, rngs=rngs)
        self.head = nnx.Param(0.3 * jax.random.normal(rngs.params(), (FEATURES, VOCABULARY)))

    def hidden(self, tokens):
        """[T, features]: entry t has seen the tokens before t."""
        inputs = self.embed(jnp.concatenate([jnp.zeros(1, tokens.dtype), tokens[:-1]]))
        carry, states = jnp.zeros(FEATURES), []
        for each in inputs:
            carry, state = self.cell(carry, each)
            states.append(state)
        return jnp.stack(states)


def logp(model, tokens):
    """The log-probability of a sequence, in nats."""
    return jnp.sum(token_stats(model.hidden(tokens), model.head[...], tokens).logp)


def main() -> tuple[float, float]:
    """Share of held-out pairs that are told apart before and after; the better sequence has the larger tokens."""
    model = Model(nnx.Rngs(0))
    pairs = jax.random.randint(jax.random.key(1), (2 * PAIRS, 2, LENGTH), 0, VOCABULARY)
    order = jnp.argsort(-pairs.sum(-1), axis=1)
    chosen, rejected = jnp.moveaxis(jnp.take_along_axis(pairs, order[..., None], axis=1), 1, 0)
    logps = nnx.jit(lambda model, tokens: jax.vmap(lambda each: logp(model, each))(tokens))
    reference = logps(model, chosen), logps(model, rejected)
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)

    @nnx.jit
    def update(model, optimizer):
        def loss(model):
            ratios = (logps(model, side[:PAIRS]) - ref[:PAIRS] for side, ref in zip((chosen, rejected), reference))
            return jnp.mean(dpo_loss(*ratios, beta=0.1))

        optimizer.update(model, nnx.grad(loss)(model))

    def accuracy():
        ratios = [logps(model, side[PAIRS:]) - ref[PAIRS:] for side, ref in zip((chosen, rejected), reference)]
        return float(jnp.mean((ratios[0] > ratios[1]) + 0.5 * (ratios[0] == ratios[1])))

    before = accuracy()
    for _ in range(100):
        update(model, optimizer)
    after = accuracy()
    print(f"held-out pairs told apart: {before:.2f} before, {after:.2f} after")
    return before, after


if __name__ == "__main__":
    main()
