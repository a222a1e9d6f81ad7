"""Differentially private training of your own loss, logistic regression (`pip install 'shiq_jax[privacy]'`).

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
    """Loss of one row, which is the unit of privacy."""
    features, label = row
    return optax.sigmoid_binary_cross_entropy(features @ params["weights"] + params["bias"], label)


def main() -> tuple[float, float]:
    """Accuracy on public rows before and after training."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(2 * ROWS, FEATURES)).astype(np.float32)
    labels = (features @ rng.normal(size=FEATURES) > 0).astype(np.float32)
    private, public = (features[:ROWS], labels[:ROWS]), (features[ROWS:], labels[ROWS:])

    # Anyone who holds the secret can subtract the noise. Resumable runs store it with Secret.create(path).
    secret = Secret(os.urandom(32))
    mechanism = Mechanism.calibrated(
        epsilon=2.0, delta=1e-5, dataset_size=ROWS, expected_batch=200, steps=60, clip=AutoS(), unit="row"
    )
    params = {"weights": jnp.zeros(FEATURES), "bias": jnp.zeros(())}
    optimizer = optax.adam(0.1)
    opt_state = optimizer.init(params)

    # The key is an argument, because constants are embedded in the compiled program, which may be cached on disk.
    @jax.jit
    def update(params, opt_state, batch, real, key, step):
        # The per-example norms and losses are private; only the noisy sum may be released.
        total, _, _ = clipped_sum(per_example(loss), params, batch, clip=mechanism.clip, mask=real)
        gradient = privatize(total, mechanism, key, step)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    def accuracy(params):
        features, labels = public
        return float(jnp.mean((features @ params["weights"] + params["bias"] > 0) == labels))

    before = accuracy(params)
    for step in range(mechanism.steps):
        # The accountant assumes Poisson samples: batches of random size in padded arrays, not shuffled epochs.
        units, real = mechanism.sample(secret.sampling, step)
        batch = jax.tree.map(lambda leaf: leaf[units], private)
        params, opt_state = update(params, opt_state, batch, real, secret.noise, step)
    epsilon = mechanism.epsilon(step + 1)
    after = accuracy(params)
    print(f"accuracy: {before:.2f} before, {after:.2f} after, epsilon {epsilon:.2f}")
    return before, after


if __name__ == "__main__":
    main()
