"""Train your own Flax model with `fit` and two callbacks, without a run directory.

python docs/examples/own_loop.py
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from shiq_jax.objectives import dpo_loss, token_stats
from shiq_jax.training.batches import DeviceBatch
from shiq_jax.training.callbacks import CheckFinite
from shiq_jax.training.fit import Callback, fit

VOCABULARY, LENGTH, PAIRS, FEATURES, BATCH, STEPS = 32, 8, 512, 16, 128, 150


class Model(nnx.Module):
    """Two layers over the cumulative sum of embeddings, with an unembedding matrix [features, vocabulary]."""

    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(VOCABULARY, FEATURES, rngs=rngs)
        self.first = nnx.Linear(FEATURES, FEATURES, rngs=rngs)
        self.second = nnx.Linear(FEATURES, FEATURES, rngs=rngs)
        self.head = nnx.Param(0.3 * jax.random.normal(rngs.params(), (FEATURES, VOCABULARY)))

    def logp(self, tokens):
        """Log-probability of each sequence in nats, [rows, T] -> [rows]."""
        previous = jnp.pad(tokens[:, :-1], ((0, 0), (1, 0)))
        hidden = self.second(nnx.relu(self.first(jnp.cumsum(self.embed(previous), axis=1))))
        return jnp.sum(token_stats(hidden, self.head[...], tokens).logp, axis=1)


class State(NamedTuple):
    """Training state; opaque to `fit`."""

    params: nnx.State
    opt_state: optax.OptState


class Evaluate(Callback):
    """Evaluate the parameters every `every` updates and after the last one."""

    def __init__(self, metric, every):
        self.metric, self.every, self.results = metric, every, {}

    def needs_state(self, step):
        """Whether to evaluate after this update."""
        return step % self.every == 0

    def on_state(self, step, state, last):
        """Evaluate before the next update donates the buffers of the state."""
        if last or self.needs_state(step):
            self.results[step] = self.metric(state.params)


def main() -> tuple[float, float]:
    """Accuracy on held-out pairs before and after training; the chosen sequence has the larger token sum."""
    graphdef, params = nnx.split(Model(nnx.Rngs(0)))
    pairs = jax.random.randint(jax.random.key(1), (2 * PAIRS, 2, LENGTH), 0, VOCABULARY)
    order = jnp.argsort(-pairs.sum(-1), axis=1)
    pairs = jnp.moveaxis(jnp.take_along_axis(pairs, order[..., None], axis=1), 1, 0)  # [2, pairs, T], chosen first
    logp = jax.jit(jax.vmap(lambda params, tokens: nnx.merge(graphdef, params).logp(tokens), (None, 0)))
    # The reference is frozen, so its log-probabilities are computed once.
    reference = logp(params, pairs)
    optimizer = optax.adam(1e-2)

    @jax.jit
    def update(state: State, batch):
        tokens, reference = batch

        def loss(params):
            return jnp.mean(dpo_loss(*(logp(params, tokens) - reference), beta=0.1))

        value, grads = jax.value_and_grad(loss)(state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state)
        metrics = {"loss": value, "grad_norm": optax.tree.norm(grads)}
        return State(optax.apply_updates(state.params, updates), opt_state), metrics

    def batches(step: int) -> DeviceBatch:
        """Batch of a step; a pure function of the step, so that a resumed loop sees the same data."""
        rows = jax.random.choice(jax.random.fold_in(jax.random.key(2), step), PAIRS, (BATCH,), replace=False)
        return DeviceBatch((pairs[:, rows], reference[:, rows]))

    def accuracy(params) -> float:
        chosen, rejected = logp(params, pairs[:, PAIRS:]) - reference[:, PAIRS:]
        return float(jnp.mean((chosen > rejected) + 0.5 * (chosen == rejected)))

    evaluate = Evaluate(accuracy, every=50)
    state = State(params, optimizer.init(params))
    before = accuracy(params)
    state = fit(state, update, batches, start=0, stop=STEPS, callbacks=[CheckFinite(), evaluate])
    print(f"accuracy on held-out pairs: {before:.2f} before, then {evaluate.results}")
    return before, evaluate.results[STEPS]


if __name__ == "__main__":
    main()
