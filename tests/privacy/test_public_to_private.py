"""The schedule from public to private data: optimizer reset, mixing weights, switch criteria and mixed updates."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from shiq_jax.objectives import OBJECTIVES
from shiq_jax.privacy import FlatClip, Mechanism, adam_state, mixing_weight, reset_optimizer
from shiq_jax.privacy.public_to_private import has_plateaued, noise_is_affordable
from shiq_jax.training.optimizers import Optimizer
from shiq_jax.training.state import init_state
from shiq_jax.training.update import make_update

MECHANISM = Mechanism(
    dataset_size=100, expected_batch=16, steps=5, noise_multiplier=1.0, delta=1e-5, largest_batch=16,
    clip=FlatClip(0.5), unit="pair",
)  # fmt: skip
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.linear_schedule(1e-2, 0, 10)))


@pytest.fixture(scope="module")
def opt_state():
    params = {"a": jnp.arange(3.0), "b": {"c": jnp.ones((2, 2))}}
    state = OPTIMIZER.init(params)
    for step in range(2):
        _, state = OPTIMIZER.update(jax.tree.map(lambda leaf: leaf + step, params), state, params)
    return state


def test_default_reset_clears_only_the_momentum(opt_state):
    before, after = adam_state(opt_state), adam_state(reset_optimizer(opt_state))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(after.mu)) and np.any(before.mu["a"])
    chex.assert_trees_all_equal((before.nu, before.count), (after.nu, after.count))
    # The learning-rate schedule has its own step count, which must not be reset.
    leaves = zip(jax.tree.leaves(opt_state), jax.tree.leaves(reset_optimizer(opt_state)), strict=True)
    changed = sum(not np.array_equal(a, b) for a, b in leaves)
    assert changed == len(jax.tree.leaves(before.mu))


@pytest.mark.parametrize("reset, field", [("squares", "nu"), ("count", "count"), ("momentum", "mu")])
def test_reset_clears_one_field(opt_state, reset, field):
    before, after = adam_state(opt_state), adam_state(reset_optimizer(opt_state, reset))
    for name in ("mu", "nu", "count"):
        same = all(jax.tree.leaves(jax.tree.map(np.array_equal, getattr(before, name), getattr(after, name))))
        assert same == (name != field)
    chex.assert_trees_all_equal(opt_state, reset_optimizer(opt_state, "none"))


def test_optimizer_without_adam_is_rejected():
    with pytest.raises(ValueError, match="has 0 Adam states"):
        reset_optimizer(optax.sgd(1.0, momentum=0.9).init(jnp.ones(2)))
    assert adam_state(Optimizer().build(10).init(jnp.ones(2))).count == 0


def test_mixing_weights():
    weights = [mixing_weight("switch", step, 10, 0.3) for step in range(10)]
    assert weights == [1, 1, 1, 0, 0, 0, 0, 0, 0, 0]
    cosine = [mixing_weight("cosine", step, 10, 0.3) for step in range(11)]
    assert cosine[0] == 0 and cosine == sorted(cosine) and cosine[10] == pytest.approx(1)
    assert mixing_weight("sample", 4, 10, 0.3) == 0.3
    with pytest.raises(ValueError, match="mixing rule 'linear' is unknown"):
        mixing_weight("linear", 0, 1, 0.5)
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\], not 2"):
        mixing_weight("switch", 0, 1, 2)


def test_switch_criteria():
    falling = [5.0, 4.0, 3.5, 3.3, 3.25, 3.24]
    assert [has_plateaued(falling[:end], 2, 0.3) for end in range(1, 7)] == [False, False, False, False, True, True]
    assert not noise_is_affordable([]) and not noise_is_affordable([9.0, 2.5]) and noise_is_affordable([9.0, 1.9])


def test_epsilon_counts_private_steps():
    assert MECHANISM.epsilon(0) == 0
    assert 0 < MECHANISM.epsilon(1) < MECHANISM.epsilon(5) == MECHANISM.epsilon()


@pytest.fixture(scope="module")
def gradient(decoder, make_batch):
    """Run a noiseless SGD update on public, private or mixed rows; return the change of the parameters."""
    model, params = decoder("tied")
    objective, optimizer = OBJECTIVES["dpo"].configure(beta=0.5), optax.sgd(1.0)
    noiseless = dataclasses.replace(MECHANISM, noise_multiplier=0.0)
    private_update = make_update(model, objective, optimizer, privacy=noiseless)
    public_update = make_update(model, objective, optimizer)
    batch = make_batch("pair")

    def take(rows):
        return jax.tree.map(lambda leaf: leaf[rows], batch)

    def run(private=None, public=None, weight=0.0):
        state, key = init_state(model, jax.tree.map(jnp.array, params), optimizer), jax.random.key(1)
        if private is None:
            state, _ = public_update(state, take(public))
        elif public is None:
            state, _ = private_update(state, take(private), private_key=key)
        else:
            state, _ = private_update(state, take(private), private_key=key, public=take(public), public_weight=weight)
        return jax.tree.map(lambda old, new: old - np.asarray(new), params, state.params())

    return run


def test_mixed_update_weights_both_gradients(gradient, relative_error):
    private, public = gradient(private=slice(0, 3)), gradient(public=slice(3, 6))
    mixed = gradient(private=slice(0, 3), public=slice(3, 6), weight=0.3)
    assert relative_error(mixed, jax.tree.map(lambda a, b: 0.7 * a + 0.3 * b, private, public)) < 1e-4
    # At weight 1 the private rows have no influence.
    only_public = [gradient(private=rows, public=slice(3, 6), weight=1.0) for rows in (slice(0, 3), slice(1, 4))]
    assert relative_error(*only_public) == 0 and relative_error(only_public[0], public) < 1e-4
