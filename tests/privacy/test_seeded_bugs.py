"""Seed well-known bugs of private training one by one and check that they are detected.

`test_audit` seeds those that an audit detects: missing clipping, halved noise, underestimated norms, double counting.
"""

import dataclasses
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from shiq_jax.models import ghost_norms, ghost_vocabulary
from shiq_jax.objectives import OBJECTIVES
from shiq_jax.privacy import FlatClip, Mechanism, clipped_sum, privatize
from shiq_jax.privacy.coverage import Coverage
from shiq_jax.sharding import make_mesh
from shiq_jax.training import private_gradient
from shiq_jax.training.state import init_state
from shiq_jax.training.update import make_update

CLIPPING = importlib.import_module("shiq_jax.privacy.clipped_sum")
CLIP, SLACK = FlatClip(0.2), 1 + 1e-3
MECHANISM = Mechanism(
    dataset_size=100, expected_batch=16, steps=5, noise_multiplier=0.0, delta=1e-5, largest_batch=16, clip=CLIP,
    unit="pair",
)  # fmt: skip


def norm(tree) -> float:
    return float(optax.tree.norm(tree))


@pytest.fixture(scope="module")
def pairs(decoder, make_batch, unit_losses):
    """Losses, parameters and a batch of pairs with a tied table, where every gradient exceeds the clip norm."""
    model, params = decoder("tied")
    return unit_losses(model, "pair"), jax.tree.map(jnp.array, params), jax.tree.map(jnp.asarray, make_batch("pair"))


def max_contribution(losses, params, batch, method) -> float:
    """Largest norm of one unit's contribution to the sum, over the clip norm; at most 1 if clipping is correct."""
    units = len(jax.tree.leaves(batch)[0])

    @jax.jit
    def contribution(mask):
        return optax.tree.norm(clipped_sum(losses, params, batch, clip=CLIP, mask=mask, method=method)[0])

    return max(float(contribution(np.arange(units) == unit)) for unit in range(units)) / CLIP.clip_norm


def test_missing_cross_term_of_a_tied_table(pairs, monkeypatch):
    assert max_contribution(*pairs, "ghost") < SLACK
    monkeypatch.setattr(
        ghost_vocabulary._Head,
        "token_gradients",
        lambda self, tokens: jnp.zeros((*tokens.shape, self.hidden.shape[-1])),
    )
    assert max_contribution(*pairs, "ghost") > 1.01
    assert max_contribution(*pairs, "vmap") < SLACK


def test_unmasked_padding(pairs, monkeypatch):
    """The content of padding must not affect the sum."""
    losses, params, batch = pairs
    mask = np.arange(len(batch.tokens)) < 4

    def distance() -> float:
        """Distance between the sums for two paddings."""
        changed = batch._replace(tokens=jnp.where(mask[:, None], batch.tokens, (batch.tokens + 1) % 7))
        sums = [
            clipped_sum(losses, params, units, clip=CLIP, mask=mask, method="ghost")[0] for units in (batch, changed)
        ]
        return norm(jax.tree.map(jnp.subtract, *sums))

    assert distance() == 0
    original = CLIPPING._masked_factors
    monkeypatch.setattr(
        CLIPPING, "_masked_factors", lambda clip, norms, mask: original(clip, norms, jnp.ones_like(mask))
    )
    assert distance() > 0.1 * CLIP.clip_norm


def test_parameter_that_is_used_twice(monkeypatch):
    """Two equal gradients: the norm of their sum is twice the norm of one, not sqrt(2) times."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(6, 4, 5)), jnp.float32)
    params = {"kernel": jnp.asarray(rng.normal(size=(5, 5)), jnp.float32)}

    def losses(params, x, tracker):
        first, second = (ghost_norms.apply(ghost_norms.product(1), x, params["kernel"], tracker) for _ in range(2))
        return jnp.sum(first + second, axis=(1, 2))

    with pytest.raises(ValueError, match="would miscount kernel"):
        max_contribution(losses, params, x, "ghost")
    monkeypatch.setattr(CLIPPING, "coverage", lambda *args: Coverage([], 0))
    assert max_contribution(losses, params, x, "ghost") == pytest.approx(2**0.5, rel=1e-3)
    assert max_contribution(losses, params, x, "scan") < SLACK


def test_division_by_sampled_batch_size(decoder, make_batch, monkeypatch):
    """One unit must change the released mean by at most C / expected batch, however small the sampled batch is."""
    model, params = decoder("tied")
    batch, objective, optimizer = make_batch("pair"), OBJECTIVES["dpo"].configure(beta=0.5), optax.sgd(1.0)

    def scaled_distance() -> float:
        released = []
        update = make_update(model, objective, optimizer, privacy=MECHANISM, method="ghost")
        for batch_size in (0, 1):
            state = init_state(model, jax.tree.map(jnp.array, params), optimizer)
            real = batch.real & (np.arange(len(batch.real)) < batch_size)[:, None]
            state, _ = update(state, batch._replace(real=real), private_key=jax.random.key(1))
            released.append(jax.tree.map(jnp.subtract, params, state.params()))
        return norm(jax.tree.map(jnp.subtract, *released)) * MECHANISM.expected_batch / CLIP.clip_norm

    assert scaled_distance() < SLACK
    original = private_gradient.clipped_sum

    def mean(*args, mask, **kwargs):
        total, norms, values = original(*args, mask=mask, **kwargs)
        scale = MECHANISM.expected_batch / jnp.maximum(jnp.sum(mask), 1)
        return jax.tree.map(lambda leaf: scale * leaf, total), norms, values

    monkeypatch.setattr(private_gradient, "clipped_sum", mean)
    assert scaled_distance() > MECHANISM.expected_batch / 2


def test_equal_noise_on_every_device(monkeypatch):
    """Shards must have independent noise, because equal noise cancels in their difference."""
    mesh, mechanism = make_mesh("fsdp=8"), dataclasses.replace(MECHANISM, noise_multiplier=1.0)
    sharding = NamedSharding(mesh, PartitionSpec("fsdp"))

    def max_correlation() -> float:
        """Largest correlation between the noise of two shards."""
        total = jax.device_put(jnp.zeros((64, 1000)), sharding)
        sample = jax.jit(
            lambda total: privatize({"a": total}, mechanism, jax.random.key(3), 0)["a"], out_shardings=sharding
        )
        shards = np.stack([np.asarray(shard.data).ravel() for shard in sample(total).addressable_shards])
        return np.abs(np.corrcoef(shards) - np.eye(8)).max()

    assert max_correlation() < 5 / np.sqrt(8000)
    original = jax.random.normal

    def repeated_normal(key, shape, dtype):
        return jnp.tile(original(key, (shape[0] // 8, *shape[1:]), dtype), (8, *(1,) * (len(shape) - 1)))

    monkeypatch.setattr(jax.random, "normal", repeated_normal)
    assert max_correlation() > 0.99
