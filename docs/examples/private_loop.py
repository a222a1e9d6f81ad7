"""A private loop around a loss of one's own, logistic regression (`pip install 'shiq_jax[privacy]'`).

python docs/examples/private_loop.py
"""

import os

import jax
import jax.numpy as jnp
import numpy as np
import optax

from shiq_jax.privacy import AutoS, Mechanism, Secret, clipped_sum, per_example, privatize

ROWS, FEATURES = 4000, 8


def loss(params, row):
    """Of one row, which is a unit by itself."""
    features, label = row
    return optax.sigmoid_binary_cross_entropy(features @ params["weights"] + params["bias"], label)


def main() -> tuple[float, float]:
    """Share of public rows whose label is told before and after."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(2 * ROWS, FEATURES)).astype(np.float32)
    labels = (features @ rng.normal(size=FEATURES) > 0).astype(np.float32)
    private, public = (features[:ROWS], labels[:ROWS]), (features[ROWS:], labels[ROWS:])

    # Whoever knows it takes the noise off. A run that may be stopped keeps it: Secret.create(path), Secret.read(path).
    secret = Secret(os.urandom(32))
    mechanism = Mechanism.calibrated(
        epsilon=2.0, delta=1e-5, dataset_size=ROWS, expected_batch=200, steps=60, clip=AutoS(), unit="row"
    )
    params = {"weights": jnp.zeros(FEATURES), "bias": jnp.zeros(())}
    optimizer = optax.adam(0.1)
    state = optimizer.init(params)

    # The key is an argument: as a constant it would stand in the compiled program, which may be kept on disk.
    @jax.jit
    def update(params, state, batch, real, key, step):
        # The norms and losses beside the sum are private.
        total, _, _ = clipped_sum(per_example(loss), params, batch, clip=mechanism.clip, mask=real)
        gradient = privatize(total, mechanism, key, step)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    def accuracy(params):
        features, labels = public
        return float(jnp.mean((features @ params["weights"] + params["bias"] > 0) == labels))

    before = accuracy(params)
    for step in range(mechanism.steps):
        # What is accounted for are these samples, of unlike size in arrays of one size, and no shuffled batches.
        units, real = mechanism.sample(secret.sampling, step)
        batch = jax.tree.map(lambda leaf: leaf[units], private)
        params, state = update(params, state, batch, real, secret.noise, step)
    spent = mechanism.epsilon(step + 1)
    after = accuracy(params)
    print(f"labels told: {before:.2f} before, {after:.2f} after, for an epsilon of {spent:.2f}")
    return before, after


if __name__ == "__main__":
    main()
