"""From public to private data: what is kept, what is counted, and that neither phase knows of the other's rows."""

import dataclasses

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
    dataset_size=100, expected_batch=16, steps=5, noise_multiplier=1.0, delta=1e-5, largest_batch=16, clip=FlatClip(0.5),
    unit="pair",
)  # fmt: skip
RULE = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.linear_schedule(1e-2, 0, 10)))


@pytest.fixture(scope="module")
def memory():
    params = {"a": jnp.arange(3.0), "b": {"c": jnp.ones((2, 2))}}
    state = RULE.init(params)
    for number in range(2):
        _, state = RULE.update(jax.tree.map(lambda leaf: leaf + number, params), state, params)
    return state


def test_the_momentum_is_forgotten_and_nothing_else(memory):
    before, after = adam_state(memory), adam_state(reset_optimizer(memory))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(after.mu)) and np.any(before.mu["a"])
    jax.tree.map(np.testing.assert_array_equal, (before.nu, before.count), (after.nu, after.count))
    # The schedule's own count is no memory of Adam's: the learning rate goes on.
    whole, changed = jax.tree.leaves(memory), jax.tree.leaves(reset_optimizer(memory))
    unlike = sum(not np.array_equal(a, b) for a, b in zip(whole, changed, strict=True))
    assert unlike == len(jax.tree.leaves(before.mu))


@pytest.mark.parametrize("reset, field", [("squares", "nu"), ("count", "count"), ("momentum", "mu")])
def test_each_reset_forgets_its_own(memory, reset, field):
    before, after = adam_state(memory), adam_state(reset_optimizer(memory, reset))
    for name in ("mu", "nu", "count"):
        same = all(jax.tree.leaves(jax.tree.map(np.array_equal, getattr(before, name), getattr(after, name))))
        assert same == (name != field)
    jax.tree.map(np.testing.assert_array_equal, memory, reset_optimizer(memory, "none"))


def test_an_optimiser_without_adam_is_refused():
    with pytest.raises(ValueError, match="has 0 memories of Adam"):
        reset_optimizer(optax.sgd(1.0, momentum=0.9).init(jnp.ones(2)))
    assert adam_state(Optimizer().build(10).init(jnp.ones(2))).count == 0


def test_mixing_weights():
    weights = [mixing_weight("switch", step, 10, 0.3) for step in range(10)]
    assert weights == [1, 1, 1, 0, 0, 0, 0, 0, 0, 0]
    cosine = [mixing_weight("cosine", step, 10, 0.3) for step in range(11)]
    assert cosine[0] == 0 and cosine == sorted(cosine) and cosine[10] == pytest.approx(1)
    assert [mixing_weight(name, 4, 10, 0.3) for name in ("sample", "only_public", "only_private")] == [0.3, 1, 0]
    with pytest.raises(ValueError, match="mixing rule 'hope' is unknown"):
        mixing_weight("hope", 0, 1, 0.5)
    with pytest.raises(ValueError, match="lies in \\[0, 1\\], not 2"):
        mixing_weight("switch", 0, 1, 2)


def test_public_numbers_alone_say_when():
    falling = [5.0, 4.0, 3.5, 3.3, 3.25, 3.24]
    assert [has_plateaued(falling[:end], 2, 0.3) for end in range(1, 7)] == [False, False, False, False, True, True]
    assert not noise_is_affordable([]) and not noise_is_affordable([9.0, 2.5]) and noise_is_affordable([9.0, 1.9])


def test_only_private_steps_are_counted():
    """After a public phase of any length the accountant stands at the private steps alone."""
    assert MECHANISM.epsilon(0) == 0
    assert 0 < MECHANISM.epsilon(1) < MECHANISM.epsilon(5) == MECHANISM.epsilon()


@pytest.fixture(scope="module")
def moved(decoder, batch_of):
    """Where an update of half public, half private gradient goes, by what is in either batch."""
    model, params = decoder("tied")
    objective, rule = OBJECTIVES["dpo"].configure(beta=0.5), optax.sgd(1.0)
    silent = dataclasses.replace(MECHANISM, noise_multiplier=0.0)
    private = make_update(model, objective, rule, privacy=silent)
    public = make_update(model, objective, rule)
    batch = batch_of("pair")

    def take(rows):
        return jax.tree.map(lambda leaf: leaf[rows], batch)

    def run(kind, rows, known=None, weight=0.0):
        state = init_state(model, jax.tree.map(jnp.array, params), rule)
        if kind == "public":
            state, _ = public(state, take(rows))
        elif known is None:
            state, _ = private(state, take(rows), private_key=jax.random.key(1))
        else:
            state, _ = private(
                state, take(rows), private_key=jax.random.key(1), public=take(known), public_weight=weight
            )
        return jax.tree.map(lambda old, new: old - np.asarray(new), params, state.params())

    return run


def test_the_mixture_is_that_of_both_gradients(moved, relative):
    mine, theirs = moved("private", slice(0, 3)), moved("public", slice(3, 6))
    mixed = moved("private", slice(0, 3), slice(3, 6), 0.3)
    assert relative(mixed, jax.tree.map(lambda a, b: 0.3 * b + 0.7 * a, mine, theirs)) < 1e-4
    # At weight 1 no private row has a part in it.
    alone = [moved("private", rows, slice(3, 6), 1.0) for rows in (slice(0, 3), slice(1, 4))]
    assert relative(*alone) == 0 and relative(alone[0], theirs) < 1e-4
