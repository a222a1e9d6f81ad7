"""Users as units: all examples of one share a row and have one gradient, that of their own mean loss."""

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

# How many answers each group has, user by user.
USERS = {"one": [2], "two": [3, 2], "four": [2, 2, 3, 2], "three": [2, 4, 2], "another": [3]}
CASES = {"trajectory": "biases", "pair": "untied", "group": "tied"}
KINDS = {"trajectory": "shiq", "pair": "dpo", "group": "vargrad"}


@pytest.fixture(scope="module")
def owned(tmp_path_factory, answer):
    """Groups of answers that belong to users; some have prompts in common."""
    rng, records = np.random.default_rng(0), []
    for user, sizes in USERS.items():
        for number, size in enumerate(sizes):
            prompt = rng.integers(5, size=rng.integers(2, 5))
            records += [answer(rng, prompt, 6, group=f"{number} of {user}", user=user) for _ in range(size)]
    buffer = Buffer.create(tmp_path_factory.mktemp("owned") / "buffer")
    # The records of a user need not stand together.
    buffer.append([records[place] for place in rng.permutation(len(records))])
    return buffer


@pytest.fixture(scope="module")
def statistics(owned, statistics_of):
    return statistics_of(owned)


@pytest.fixture(scope="module")
def drawn(owned, statistics):
    """(units, a batch of all of them, in the sampler's order, and three places without one)."""

    @functools.cache
    def make(unit):
        units = privacy_units(owned, unit, "user")
        mechanism = Mechanism.sized(
            dataset_size=len(units), expected_batch=len(units), multiple=4, steps=1, noise_multiplier=0.0, delta=1e-2,
            clip=FlatClip(1.0), unit="user",
        )  # fmt: skip
        secret = Secret.insecure(0)
        batches = PrivateBatches(owned, units, mechanism, secret, references={"reference": statistics})
        numbers, real = mechanism.sample(secret.sampling, 0)
        assert sorted(numbers[real]) == list(range(len(units)))
        return [units[number] for number in numbers[real]], batches(0).batch

    return make


@pytest.fixture(scope="module")
def gradients(owned, statistics, drawn, decoder):
    """(loss of every user, its gradient): the examples one to a row, added up by hand."""

    @functools.cache
    def make(unit):
        model, params = decoder(CASES[unit])
        objective = OBJECTIVES[KINDS[unit]].configure(beta=0.5)

        def loss(params, batch):
            out = jax.vmap(jax.vmap(objective.loss))(build_examples(model, objective, params, {}, batch))
            value, weight = (jnp.sum(jnp.where(batch.real, each, 0)) for each in (out.value, out.weight))
            return value / weight

        units = drawn(unit)[0]
        most = max(map(len, units))
        shape = plan(owned, [(example,) for examples in units for example in examples], multiple=8)._replace(slots=1)
        gradient = jax.jit(jax.value_and_grad(loss))
        found = []
        for examples in units:
            batch = pack(
                [(example,) for example in examples],
                owned,
                shape,
                references={"reference": statistics},
                rows_multiple=most,
            ).batch
            assert batch.real.sum() == len(examples) and batch.real.shape == (most, 1)
            found.append(jax.device_get(gradient(params, batch)))
        return found

    return make


def test_users_have_unlike_numbers_of_examples(drawn):
    for unit, numbers in (("trajectory", [2, 3, 5, 8, 9]), ("pair", [1, 1, 2, 3, 4]), ("group", [1, 1, 2, 3, 4])):
        units, batch = drawn(unit)
        assert sorted(map(len, units)) == numbers
        # Everything of a user is in a row of its own, and the places without a user hold nothing.
        assert batch.real.sum(axis=1).tolist() == [*map(len, units), 0, 0, 0]


def length_of(tree) -> float:
    return float(np.sqrt(sum(np.sum(np.square(leaf, dtype=np.float64)) for leaf in jax.tree.leaves(tree))))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ghost", "bk", "scan"])
@pytest.mark.parametrize("unit", CASES)
def test_the_whole_gradient_of_a_user_is_clipped(method, unit, drawn, gradients, decoder, example_losses, relative):
    model, params = decoder(CASES[unit])
    batch, known = drawn(unit)[1], gradients(unit)
    norms = np.array([length_of(grads) for _, grads in known])
    clip = FlatClip(float(np.median(norms)))
    factors = np.minimum(1, clip.clip_norm / norms)
    assert 0 < (factors < 1).sum() < len(factors)
    losses, mask = example_losses(model, unit), np.any(batch.real, axis=1)
    total, found, values = jax.jit(
        lambda params: clipped_sum(losses, params, batch, clip=clip, mask=mask, method=method)
    )(params)
    np.testing.assert_allclose(found[: len(norms)], norms, rtol=1e-5)
    np.testing.assert_allclose(values[: len(norms)], [value for value, _ in known], rtol=1e-5)
    wanted = jax.tree.map(lambda *leaves: np.tensordot(factors, np.stack(leaves), 1), *(grads for _, grads in known))
    assert relative(total, wanted) < 1e-5


def test_groupwise_clipping_of_users(drawn, gradients, decoder, example_losses, relative):
    """Each parameter of each layer by itself, of all examples of the user together."""
    model, params = decoder(CASES["pair"])
    batch = drawn("pair")[1]
    clip = Groupwise(FlatClip(1.0), count_groups(params))

    def clipped(path, *leaves):
        leaf = np.stack(leaves)
        lead = 2 if path[0].key == "layers" else 1
        norms = np.sqrt(np.sum(np.square(leaf), axis=tuple(range(lead, leaf.ndim)), keepdims=True))
        return np.sum(clip.per_group(norms) * leaf, axis=0)

    wanted = jax.tree_util.tree_map_with_path(clipped, *(grads for _, grads in gradients("pair")))
    losses, mask = example_losses(model, "pair"), np.any(batch.real, axis=1)
    total, *_ = jax.jit(lambda params: clipped_sum(losses, params, batch, clip=clip, mask=mask))(params)
    assert relative(total, wanted) < 1e-5


@pytest.mark.parametrize("microbatches", [1, 4])
def test_an_update_takes_rows_of_users(microbatches, drawn, gradients, decoder, relative):
    model, params = decoder(CASES["pair"])
    mechanism = Mechanism(
        dataset_size=50, expected_batch=4, steps=1, noise_multiplier=0.0, delta=1e-3, largest_batch=8, clip=FlatClip(0.5),
        unit="user",
    )  # fmt: skip
    objective, rule = OBJECTIVES["dpo"].configure(beta=0.5), optax.sgd(1.0)
    state = init_state(model, jax.tree.map(jnp.array, params), rule)
    update = make_update(model, objective, rule, privacy=mechanism, microbatches=microbatches, method="ghost")
    state, _ = update(state, drawn("pair")[1], private_key=jax.random.key(5))
    moved = jax.tree.map(lambda old, new: old - np.asarray(new), params, jax.device_get(state.params()))
    grads = [grads for _, grads in gradients("pair")]
    factors = [min(1, 0.5 / length_of(each)) / 4 for each in grads]
    wanted = jax.tree.map(lambda *leaves: np.tensordot(factors, np.stack(leaves), 1), *grads)
    assert relative(moved, wanted) < 1e-4
