"""Users as units: all examples of a user share a row and are clipped as one gradient, that of their mean loss."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from shiq_jax.objectives import OBJECTIVES
from shiq_jax.privacy import FlatClip, Groupwise, Mechanism, clipped_sum, count_groups
from shiq_jax.privacy.secret import Secret
from shiq_jax.replay import Buffer, pack, plan
from shiq_jax.training.examples import build_examples
from shiq_jax.training.private_batches import PrivateBatches, privacy_units
from shiq_jax.training.state import init_state
from shiq_jax.training.update import make_update

# User -> number of answers in each group.
USERS = {"one": [2], "two": [3, 2], "four": [2, 2, 3, 2], "three": [2, 4, 2], "another": [3]}
VARIANTS = {"trajectory": "biases", "pair": "untied", "group": "tied"}
OBJECTIVE_NAMES = {"trajectory": "shiq", "pair": "dpo", "group": "vargrad"}


@pytest.fixture(scope="module")
def user_buffer(tmp_path_factory, make_record):
    """Groups of answers with user ids; some users share prompts."""
    rng, records = np.random.default_rng(0), []
    for user, sizes in USERS.items():
        for index, size in enumerate(sizes):
            prompt = rng.integers(5, size=rng.integers(2, 5))
            records += [make_record(rng, prompt, 6, group=f"{index} of {user}", user=user) for _ in range(size)]
    buffer = Buffer.create(tmp_path_factory.mktemp("users") / "buffer")
    # Shuffle, because records of a user need not be contiguous.
    buffer.append([records[index] for index in rng.permutation(len(records))])
    return buffer


@pytest.fixture(scope="module")
def statistics(user_buffer, make_statistics):
    return make_statistics(user_buffer)


@pytest.fixture(scope="module")
def units_and_batch(user_buffer, statistics):
    """Make (units, a batch of all of them in sampled order, padded with three empty rows)."""

    @functools.cache
    def make(unit):
        units = privacy_units(user_buffer, unit, "user")
        mechanism = Mechanism.from_noise_multiplier(
            dataset_size=len(units), expected_batch=len(units), multiple=4, steps=1, noise_multiplier=0.0, delta=1e-2,
            clip=FlatClip(1.0), unit="user",
        )  # fmt: skip
        secret = Secret.insecure(0)
        batches = PrivateBatches(user_buffer, units, mechanism, secret, references={"reference": statistics})
        sampled, mask = mechanism.sample(secret.sampling, 0)
        assert sorted(sampled[mask]) == list(range(len(units)))
        return [units[index] for index in sampled[mask]], batches(0).batch

    return make


@pytest.fixture(scope="module")
def user_gradients(user_buffer, statistics, units_and_batch, decoder):
    """Make (loss, gradient) of every user from batches with one example per row."""

    @functools.cache
    def make(unit):
        model, params = decoder(VARIANTS[unit])
        objective = OBJECTIVES[OBJECTIVE_NAMES[unit]].configure(beta=0.5)

        def loss(params, batch):
            out = jax.vmap(jax.vmap(objective.loss))(build_examples(model, objective, params, {}, batch))
            value, weight = (jnp.sum(jnp.where(batch.real, leaf, 0)) for leaf in (out.value, out.weight))
            return value / weight

        units = units_and_batch(unit)[0]
        max_examples = max(map(len, units))
        shape = plan(user_buffer, [(example,) for examples in units for example in examples], multiple=8)._replace(
            slots=1
        )
        value_and_grad = jax.jit(jax.value_and_grad(loss))
        results = []
        for examples in units:
            batch = pack(
                [(example,) for example in examples],
                user_buffer,
                shape,
                references={"reference": statistics},
                rows_multiple=max_examples,
            ).batch
            assert batch.real.sum() == len(examples) and batch.real.shape == (max_examples, 1)
            results.append(jax.device_get(value_and_grad(params, batch)))
        return results

    return make


def test_each_row_holds_all_examples_of_a_user(units_and_batch):
    for unit, counts in (("trajectory", [2, 3, 5, 8, 9]), ("pair", [1, 1, 2, 3, 4]), ("group", [1, 1, 2, 3, 4])):
        units, batch = units_and_batch(unit)
        assert sorted(map(len, units)) == counts
        # The last three rows are padding.
        assert batch.real.sum(axis=1).tolist() == [*map(len, units), 0, 0, 0]


def norm(tree) -> float:
    return float(np.sqrt(sum(np.sum(np.square(leaf, dtype=np.float64)) for leaf in jax.tree.leaves(tree))))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ghost", "bk", "scan"])
@pytest.mark.parametrize("unit", VARIANTS)
def test_methods_clip_the_gradient_of_a_user(
    method, unit, units_and_batch, user_gradients, decoder, unit_losses, relative_error
):
    model, params = decoder(VARIANTS[unit])
    batch, expected = units_and_batch(unit)[1], user_gradients(unit)
    expected_norms = np.array([norm(grads) for _, grads in expected])
    clip = FlatClip(float(np.median(expected_norms)))
    factors = np.minimum(1, clip.clip_norm / expected_norms)
    assert 0 < (factors < 1).sum() < len(factors)
    losses, mask = unit_losses(model, unit), np.any(batch.real, axis=1)
    total, norms, values = jax.jit(
        lambda params: clipped_sum(losses, params, batch, clip=clip, mask=mask, method=method)
    )(params)
    users = len(expected)
    np.testing.assert_allclose(norms[:users], expected_norms, rtol=1e-5)
    np.testing.assert_allclose(values[:users], [value for value, _ in expected], rtol=1e-5)
    expected_total = jax.tree.map(
        lambda *leaves: np.tensordot(factors, np.stack(leaves), 1), *(grads for _, grads in expected)
    )
    assert relative_error(total, expected_total) < 1e-5


def test_groupwise_clipping_of_users(units_and_batch, user_gradients, decoder, unit_losses, relative_error):
    model, params = decoder(VARIANTS["pair"])
    batch = units_and_batch("pair")[1]
    clip = Groupwise(FlatClip(1.0), count_groups(params))

    def clipped(path, *leaves):
        leaf = np.stack(leaves)
        leading_axes = 2 if path[0].key == "layers" else 1
        norms = np.sqrt(np.sum(np.square(leaf), axis=tuple(range(leading_axes, leaf.ndim)), keepdims=True))
        return np.sum(clip.group_rule(norms) * leaf, axis=0)

    expected_total = jax.tree_util.tree_map_with_path(clipped, *(grads for _, grads in user_gradients("pair")))
    losses, mask = unit_losses(model, "pair"), np.any(batch.real, axis=1)
    total, *_ = jax.jit(lambda params: clipped_sum(losses, params, batch, clip=clip, mask=mask))(params)
    assert relative_error(total, expected_total) < 1e-5


@pytest.mark.parametrize("microbatches", [1, 4])
def test_update_with_users_as_units(microbatches, units_and_batch, user_gradients, decoder, relative_error):
    model, params = decoder(VARIANTS["pair"])
    mechanism = Mechanism(
        dataset_size=50, expected_batch=4, steps=1, noise_multiplier=0.0, delta=1e-3, largest_batch=8,
        clip=FlatClip(0.5), unit="user",
    )  # fmt: skip
    objective, optimizer = OBJECTIVES["dpo"].configure(beta=0.5), optax.sgd(1.0)
    state = init_state(model, jax.tree.map(jnp.array, params), optimizer)
    update = make_update(model, objective, optimizer, privacy=mechanism, microbatches=microbatches, method="ghost")
    state, _ = update(state, units_and_batch("pair")[1], private_key=jax.random.key(5))
    gradient = jax.tree.map(lambda old, new: old - np.asarray(new), params, jax.device_get(state.params()))
    grads = [grads for _, grads in user_gradients("pair")]
    factors = [min(1, 0.5 / norm(user_grads)) / 4 for user_grads in grads]
    expected = jax.tree.map(lambda *leaves: np.tensordot(factors, np.stack(leaves), 1), *grads)
    assert relative_error(gradient, expected) < 1e-4
