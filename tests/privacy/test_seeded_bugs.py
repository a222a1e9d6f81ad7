"""Bugs that private training is known for, planted one by one: for each the check that is there to see it does.

Those that the audit sees (no clipping, half the noise, norms too small, a unit counted twice) are planted beside it.
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
def pairs(decoder, batch_of, example_losses):
    """Losses, parameters and a batch of pairs under a tied table, every gradient longer than the clip norm."""
    model, params = decoder("tied")
    return example_losses(model, "pair"), jax.tree.map(jnp.array, params), jax.tree.map(jnp.asarray, batch_of("pair"))


def longest_contribution(losses, params, batch, method) -> float:
    """The largest norm of what one unit adds to the sum, over the clip norm; a sound sum never exceeds 1."""
    units = len(jax.tree.leaves(batch)[0])

    @jax.jit
    def added(mask):
        return optax.tree.norm(clipped_sum(losses, params, batch, clip=CLIP, mask=mask, method=method)[0])

    return max(float(added(np.arange(units) == unit)) for unit in range(units)) / CLIP.clip_norm


def test_the_cross_term_of_a_tied_table_is_missed(pairs, monkeypatch):
    assert longest_contribution(*pairs, "ghost") < SLACK
    monkeypatch.setattr(
        ghost_vocabulary._Head,
        "token_gradients",
        lambda self, tokens: jnp.zeros((*tokens.shape, self.hidden.shape[-1])),
    )
    assert longest_contribution(*pairs, "ghost") > 1.01
    assert longest_contribution(*pairs, "vmap") < SLACK


def test_padding_is_counted(pairs, monkeypatch):
    """A place without a unit adds nothing, whatever numbers are there."""
    losses, params, batch = pairs
    mask = np.arange(len(batch.tokens)) < 4

    def moved() -> float:
        """How far the sum moves when other numbers stand where no unit is."""
        other = batch._replace(tokens=jnp.where(mask[:, None], batch.tokens, (batch.tokens + 1) % 7))
        one, two = (
            clipped_sum(losses, params, each, clip=CLIP, mask=mask, method="ghost")[0] for each in (batch, other)
        )
        return norm(jax.tree.map(jnp.subtract, one, two))

    assert moved() == 0
    sound = CLIPPING._factors
    monkeypatch.setattr(CLIPPING, "_factors", lambda clip, norms, real: sound(clip, norms, jnp.ones_like(real)))
    assert moved() > 0.1 * CLIP.clip_norm


def test_a_weight_is_used_twice(monkeypatch):
    """Two uses whose gradients agree: the norm of their sum is twice that of one, not the root of two."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(6, 4, 5)), jnp.float32)
    weight = {"kernel": jnp.asarray(rng.normal(size=(5, 5)), jnp.float32)}

    def losses(params, x, tracker):
        first, second = (ghost_norms.apply(ghost_norms.product(1), x, params["kernel"], tracker) for _ in range(2))
        return jnp.sum(first + second, axis=(1, 2))

    with pytest.raises(ValueError, match="would miscount kernel"):
        longest_contribution(losses, weight, x, "ghost")
    monkeypatch.setattr(CLIPPING, "coverage", lambda *given: Coverage([], 0))
    assert longest_contribution(losses, weight, x, "ghost") == pytest.approx(2**0.5, rel=1e-3)
    assert longest_contribution(losses, weight, x, "scan") < SLACK


def test_the_mean_of_what_was_drawn_in_the_place_of_the_sum(decoder, batch_of, monkeypatch):
    """One unit more or less moves what is released by at most C over the expected batch, however few were drawn."""
    model, params = decoder("tied")
    batch, objective, rule = batch_of("pair"), OBJECTIVES["dpo"].configure(beta=0.5), optax.sgd(1.0)

    def moved() -> float:
        released = []
        update = make_update(model, objective, rule, privacy=MECHANISM, method="ghost")
        for drawn in (0, 1):
            state = init_state(model, jax.tree.map(jnp.array, params), rule)
            real = batch.real & (np.arange(len(batch.real)) < drawn)[:, None]
            state, _ = update(state, batch._replace(real=real), private_key=jax.random.key(1))
            released.append(jax.tree.map(jnp.subtract, params, state.params()))
        return norm(jax.tree.map(jnp.subtract, *released)) * MECHANISM.expected_batch / CLIP.clip_norm

    assert moved() < SLACK
    sound = private_gradient.clipped_sum

    def mean(*given, mask, **options):
        total, norms, values = sound(*given, mask=mask, **options)
        share = MECHANISM.expected_batch / jnp.maximum(jnp.sum(mask), 1)
        return jax.tree.map(lambda leaf: share * leaf, total), norms, values

    monkeypatch.setattr(private_gradient, "clipped_sum", mean)
    assert moved() > MECHANISM.expected_batch / 2


def test_every_device_draws_the_same_noise(monkeypatch):
    """The noise of parts that lie on unlike devices must not be alike: differences would be free of it."""
    mesh, loud = make_mesh("fsdp=8"), dataclasses.replace(MECHANISM, noise_multiplier=1.0)
    where = NamedSharding(mesh, PartitionSpec("fsdp"))

    def alike() -> float:
        """The largest correlation between two devices' parts."""
        total = jax.device_put(jnp.zeros((64, 1000)), where)
        noise = jax.jit(lambda total: privatize({"a": total}, loud, jax.random.key(3), 0)["a"], out_shardings=where)(
            total
        )
        parts = np.stack([np.asarray(shard.data).ravel() for shard in noise.addressable_shards])
        return np.abs(np.corrcoef(parts) - np.eye(8)).max()

    bound = 5 / np.sqrt(8000)
    assert alike() < bound
    sound = jax.random.normal

    def on_each(key, shape, dtype):
        return jnp.tile(sound(key, (shape[0] // 8, *shape[1:]), dtype), (8, *(1,) * (len(shape) - 1)))

    monkeypatch.setattr(jax.random, "normal", on_each)
    assert alike() > 0.99
