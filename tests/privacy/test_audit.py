"""The real step as an attacker sees it: a lower bound on epsilon from canaries, and that bugs would show.

White box, q = 1, one step: a canary's gradient lies in a coordinate of its own, a line of the embedding table, and is
longer than the clip norm. Half of the canaries are in the batch; what is released along each is its score.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax_privacy.auditing import CanaryScoreAuditor

from shiq_jax.models import DecoderConfig, Model, init_params
from shiq_jax.objectives import OBJECTIVES, Example
from shiq_jax.privacy import FlatClip, Mechanism
from shiq_jax.privacy.secret import Secret
from shiq_jax.replay import Batch
from shiq_jax.sharding import make_mesh
from shiq_jax.training.placement import shard_batch
from shiq_jax.training.private_gradient import UnitLosses
from shiq_jax.training.state import init_state, partition
from shiq_jax.training.update import make_update

CANARIES, SIGNIFICANCE = 4096, 0.01
MECHANISM = Mechanism(
    dataset_size=CANARIES, expected_batch=CANARIES, steps=1, noise_multiplier=1.0, delta=1e-5, largest_batch=CANARIES,
    clip=FlatClip(0.01),
)  # fmt: skip
THEORY = MECHANISM.epsilon()
CONFIG = DecoderConfig(
    vocab_size=CANARIES, hidden_size=8, intermediate_size=8, num_layers=1, num_heads=2, num_kv_heads=1,
    tie_word_embeddings=False,
)  # fmt: skip


def canaries() -> Batch:
    """Row i is token i, and token 0 as the answer to it."""
    one = np.ones((CANARIES, 1), np.int32)
    tokens = np.concatenate([np.arange(CANARIES, dtype=np.int32)[:, None], 0 * one], axis=1)
    intervals = np.tile(np.array([[[0, 2], [1, 2]]], np.int32), (CANARIES, 1, 1))
    gather = np.zeros((CANARIES, 1, 1, 1), np.int32)
    return Batch(
        tokens=tokens, positions=np.tile(np.arange(2, dtype=np.int32), (CANARIES, 1)), intervals=intervals,
        predictors=0 * one, targets=0 * one, gather=gather,
        example=Example(action_mask=gather >= 0, rewards=np.zeros(gather.shape, np.float32)), real=one > 0,
    )  # fmt: skip


@pytest.fixture(scope="module")
def setting():
    """Model on eight devices, a maker of parameters, the canaries, and the direction of each one's gradient."""
    model = Model.from_config(CONFIG, mesh=make_mesh("fsdp=4,tensor=2"))
    batch = canaries()

    def params():
        # Long gradients, so that clipping has something to do.
        return jax.tree.map(lambda leaf: 20 * leaf if leaf.ndim > 1 else leaf, init_params(model, jax.random.key(0)))

    learns, rests = partition(params(), lambda path: path[0] == "embed")
    losses = UnitLosses(model, OBJECTIVES["sft"], rests, {})
    # Canaries have nothing in common, so the gradient of the sum of their losses holds them all, one to a line.
    lines = jax.jit(jax.grad(lambda learns: jnp.sum(losses(learns, batch, None))))(learns)["embed"]["table"]
    lines = np.asarray(lines)
    lengths = np.linalg.norm(lines, axis=1, keepdims=True)
    assert lengths.min() > MECHANISM.clip.clip_norm
    return model, params, batch, lines / lengths


def epsilon_of_a_step(setting, seed: int) -> float:
    """A lower bound at the significance, from the released update of a real step."""
    model, params, batch, directions = setting
    inside = np.random.default_rng(seed).random(CANARIES) < 0.5
    rule = optax.sgd(1.0)
    update = make_update(model, OBJECTIVES["sft"], rule, privacy=MECHANISM, method="ghost")
    state = init_state(model, params(), rule, trainable=lambda path: path[0] == "embed")
    before = np.asarray(state.trainable["embed"]["table"])
    given = shard_batch(batch._replace(real=batch.real & inside[:, None]), model.mesh)
    state, _ = update(state, given, Secret.insecure(seed).noise)
    released = (before - np.asarray(state.trainable["embed"]["table"])) * MECHANISM.expected_batch
    scores = np.sum(released * directions, axis=1) / MECHANISM.clip.clip_norm
    return CanaryScoreAuditor(scores[inside], scores[~inside]).epsilon_from_gdp(SIGNIFICANCE, MECHANISM.delta)


def test_theory():
    np.testing.assert_allclose(THEORY, 4.377, atol=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_what_is_measured_lies_below_epsilon_and_above_half_of_it(seed, setting):
    assert THEORY / 2 < epsilon_of_a_step(setting, seed) < THEORY


def test_without_clipping_more_is_measured(setting, monkeypatch):
    monkeypatch.setattr(FlatClip, "__call__", lambda self, norms: jnp.ones_like(norms))
    assert epsilon_of_a_step(setting, 0) > THEORY


def test_with_half_the_noise_more_is_measured(setting, monkeypatch):
    monkeypatch.setattr(Mechanism, "noise_stddev", property(lambda self: 0.5 * self.clip.sensitivity))
    assert epsilon_of_a_step(setting, 0) > THEORY


def test_norms_that_are_too_small_by_a_third_show(setting, monkeypatch):
    """As those of a parameter that is used twice are, when the two parts are not brought together."""
    clipped = FlatClip.__call__
    monkeypatch.setattr(FlatClip, "__call__", lambda self, norms: clipped(self, norms / 1.5))
    assert epsilon_of_a_step(setting, 0) > THEORY


def test_a_unit_that_is_counted_twice_shows(setting, monkeypatch):
    import shiq_jax.training.private_gradient as module

    once = module.clipped_sum

    def twice(*args, **options):
        total, norms, values = once(*args, **options)
        return jax.tree.map(lambda leaf: 2 * leaf, total), norms, values

    monkeypatch.setattr(module, "clipped_sum", twice)
    assert epsilon_of_a_step(setting, 0) > THEORY
