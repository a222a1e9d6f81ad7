"""Distribution, independence and sharding of the noise of `privatize`, and its divisor."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from scipy import stats

from shiq_jax.privacy import FlatClip, Mechanism, privatize
from shiq_jax.sharding import make_mesh

MECHANISM = Mechanism(
    dataset_size=1000,
    expected_batch=50,
    steps=10,
    noise_multiplier=1.3,
    delta=1e-5,
    largest_batch=100,
    clip=FlatClip(0.7),
)
ROOT = jax.random.key(11)


@pytest.fixture(scope="module")
def noise():
    """Noise of two steps on three leaves with 1.5 million values, over its standard deviation."""
    zeros = {"a": jnp.zeros((500, 1000)), "b": jnp.zeros(500_000), "layers": jnp.zeros((5, 100, 1000))}

    def sample(step):
        return jax.tree.map(lambda leaf: np.asarray(leaf) * 50 / (1.3 * 0.7), privatize(zeros, MECHANISM, ROOT, step))

    return sample(0), sample(1)


def test_noise_is_normal_with_the_right_stddev(noise):
    values = np.concatenate([leaf.ravel() for leaf in noise[0].values()])
    size = len(values)
    assert abs(values.mean()) < 4 / np.sqrt(size)
    assert abs(values.std() - 1) < 4 / np.sqrt(2 * size)
    assert stats.kstest(values, "norm").pvalue > 1e-3


def test_noise_is_uncorrelated(noise):
    (first, second), bound = noise, 4 / np.sqrt(500_000)
    a, b, stack = first["a"].ravel(), first["b"], first["layers"].ravel()
    pairs = {
        "neighbors": (a[:-1], a[1:]),
        "leaves": (a, b),
        "steps": (a, second["a"].ravel()),
        "rows": (a[:-1000], a[1000:]),
        "layers": (stack[:-100_000], stack[100_000:]),
        "matrix and stack": (a, stack),
    }
    for name, (x, y) in pairs.items():
        assert abs(np.corrcoef(x, y)[0, 1]) < bound, name


def test_divisor_is_expected_batch():
    noiseless = dataclasses.replace(MECHANISM, noise_multiplier=0.0)
    np.testing.assert_allclose(privatize({"a": jnp.full(3, 7.0)}, noiseless, ROOT, 0)["a"], 7 / 50)


@pytest.mark.parametrize("spec", [PartitionSpec("fsdp"), PartitionSpec(None, "fsdp"), PartitionSpec()])
@pytest.mark.parametrize("shape", [(16, 24), (16, 24, 3), (8, 8, 4, 2)])
def test_noise_is_independent_of_sharding(spec, shape):
    mesh = make_mesh("fsdp=8")
    total = {"a": jnp.arange(np.prod(shape), dtype=jnp.float32).reshape(shape)}
    unsharded = jax.jit(lambda total: privatize(total, MECHANISM, ROOT, 3))(total)
    sharding = {"a": NamedSharding(mesh, spec)}
    sharded = jax.jit(
        lambda total: privatize(total, MECHANISM, ROOT, 3), in_shardings=(sharding,), out_shardings=sharding
    )(total)
    np.testing.assert_array_equal(unsharded["a"], sharded["a"])
    for shard in sharded["a"].addressable_shards:
        np.testing.assert_array_equal(shard.data, np.asarray(unsharded["a"])[shard.index])


def test_stacks_need_noise_memory_for_one_layer():
    total = {"a": jnp.zeros((16, 256, 256)), "b": jnp.zeros((16, 256, 4, 64))}
    program = jax.jit(lambda total: privatize(total, MECHANISM, ROOT, 0), donate_argnums=0).lower(total).compile()
    assert program.memory_analysis().temp_size_in_bytes < 0.75 * sum(leaf.nbytes for leaf in total.values())
