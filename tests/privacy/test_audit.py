"""White-box audit of the update step: a lower bound on epsilon from canaries, which detects seeded bugs.

One step with q = 1. The gradient of each canary lies in its own row of the embedding table and exceeds the clip norm.
Half of the canaries are in the batch; the score of a canary is the released gradient along its direction.
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
from shiq_jax.training import private_gradient
from shiq_jax.training.placement import shard_batch
from shiq_jax.training.private_gradient import UnitLosses
from shiq_jax.training.state import init_state, partition
from shiq_jax.training.update import make_update

CANARIES, SIGNIFICANCE = 4096, 0.01
MECHANISM = Mechanism(
    dataset_size=CANARIES, expected_batch=CANARIES, steps=1, noise_multiplier=1.0, delta=1e-5, largest_batch=CANARIES,
    clip=FlatClip(0.01),
)  # fmt: skip
EXPECTED_EPSILON = MECHANISM.epsilon()
CONFIG = DecoderConfig(
    vocab_size=CANARIES, hidden_size=8, intermediate_size=8, num_layers=1, num_heads=2, num_kv_heads=1,
    tie_word_embeddings=False,
)  # fmt: skip


def canaries() -> Batch:
    """Row i has token i as prompt and token 0 as completion."""
    ones = np.ones((CANARIES, 1), np.int32)
    tokens = np.concatenate([np.arange(CANARIES, dtype=np.int32)[:, None], 0 * ones], axis=1)
    intervals = np.tile(np.array([[[0, 2], [1, 2]]], np.int32), (CANARIES, 1, 1))
    gather = np.zeros((CANARIES, 1, 1, 1), np.int32)
    return Batch(
        tokens=tokens, positions=np.tile(np.arange(2, dtype=np.int32), (CANARIES, 1)), intervals=intervals,
        predictors=0 * ones, targets=0 * ones, gather=gather,
        example=Example(action_mask=gather >= 0, rewards=np.zeros(gather.shape, np.float32)), real=ones > 0,
    )  # fmt: skip


@pytest.fixture(scope="module")
def setup():
    """Model on eight devices, a parameter factory, the canaries, and the gradient direction of each."""
    model = Model.from_config(CONFIG, mesh=make_mesh("fsdp=4,tensor=2"))
    batch = canaries()

    def make_params():
        # Scale the parameters up so that every gradient is clipped.
        return jax.tree.map(lambda leaf: 20 * leaf if leaf.ndim > 1 else leaf, init_params(model, jax.random.key(0)))

    trainable, frozen = partition(make_params(), lambda path: path[0] == "embed")
    losses = UnitLosses(model, OBJECTIVES["sft"], frozen, {})
    # Canary gradients do not overlap, so row i of the summed gradient is that of canary i.
    grads = jax.jit(jax.grad(lambda params: jnp.sum(losses(params, batch, None))))(trainable)["embed"]["table"]
    grads = np.asarray(grads)
    norms = np.linalg.norm(grads, axis=1, keepdims=True)
    assert norms.min() > MECHANISM.clip.clip_norm
    return model, make_params, batch, grads / norms


def audited_epsilon(setup, seed: int) -> float:
    """Lower bound on epsilon at `SIGNIFICANCE`, from the parameters that one update releases."""
    model, make_params, batch, directions = setup
    included = np.random.default_rng(seed).random(CANARIES) < 0.5
    optimizer = optax.sgd(1.0)
    update = make_update(model, OBJECTIVES["sft"], optimizer, privacy=MECHANISM, method="ghost")
    state = init_state(model, make_params(), optimizer, trainable=lambda path: path[0] == "embed")
    before = np.asarray(state.trainable["embed"]["table"])
    batch = shard_batch(batch._replace(real=batch.real & included[:, None]), model.mesh)
    state, _ = update(state, batch, Secret.insecure(seed).noise)
    released = (before - np.asarray(state.trainable["embed"]["table"])) * MECHANISM.expected_batch
    scores = np.sum(released * directions, axis=1) / MECHANISM.clip.clip_norm
    return CanaryScoreAuditor(scores[included], scores[~included]).epsilon_from_gdp(SIGNIFICANCE, MECHANISM.delta)


def test_expected_epsilon():
    np.testing.assert_allclose(EXPECTED_EPSILON, 4.377, atol=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_audited_epsilon_is_between_half_and_full_epsilon(seed, setup):
    assert EXPECTED_EPSILON / 2 < audited_epsilon(setup, seed) < EXPECTED_EPSILON


def test_audit_detects_missing_clipping(setup, monkeypatch):
    monkeypatch.setattr(FlatClip, "__call__", lambda self, norms: jnp.ones_like(norms))
    assert audited_epsilon(setup, 0) > EXPECTED_EPSILON


def test_audit_detects_halved_noise(setup, monkeypatch):
    monkeypatch.setattr(Mechanism, "noise_stddev", property(lambda self: 0.5 * self.clip.sensitivity))
    assert audited_epsilon(setup, 0) > EXPECTED_EPSILON


def test_audit_detects_underestimated_norms(setup, monkeypatch):
    """Such as those of a parameter that is used twice, if the cross term is missing."""
    original = FlatClip.__call__
    monkeypatch.setattr(FlatClip, "__call__", lambda self, norms: original(self, norms / 1.5))
    assert audited_epsilon(setup, 0) > EXPECTED_EPSILON


def test_audit_detects_double_counting(setup, monkeypatch):
    original = private_gradient.clipped_sum

    def doubled(*args, **kwargs):
        total, norms, values = original(*args, **kwargs)
        return jax.tree.map(lambda leaf: 2 * leaf, total), norms, values

    monkeypatch.setattr(private_gradient, "clipped_sum", doubled)
    assert audited_epsilon(setup, 0) > EXPECTED_EPSILON
