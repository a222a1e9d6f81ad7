"""Fixtures: a tiny decoder, groups of random records with rewards, and an unpacked forward pass to compare with."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shiq_jax.models import DecoderConfig, Model
from shiq_jax.objectives import TokenStats, token_stats_from_logits
from shiq_jax.replay import Buffer, Record
from shiq_jax.sharding import make_mesh

CONFIG = DecoderConfig(vocab_size=50, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, num_kv_heads=2)
GROUP_SIZES = (3, 1, 4, 2, 3, 2, 1, 4, 2, 3)


def random_records(seed: int, sizes=GROUP_SIZES) -> list[Record]:
    """Groups of different sizes and lengths, one prompt each, with environment tokens between the actions."""
    rng = np.random.default_rng(seed)
    records = []
    for group_index, size in enumerate(sizes):
        prompt = rng.integers(CONFIG.vocab_size, size=rng.integers(2, 9))
        for _ in range(size):
            completion = rng.integers(CONFIG.vocab_size, size=rng.integers(2, 10))
            mask = rng.random(len(completion)) < 0.8
            mask[-1] = True
            records.append(
                Record(
                    tokens=np.concatenate([prompt, completion]),
                    action_mask=np.concatenate([np.zeros(len(prompt), bool), mask]),
                    rewards=rng.normal(size=int(mask.sum())).astype(np.float32),
                    group=f"group {group_index}",
                )
            )
    return records


@pytest.fixture(scope="module", autouse=True)
def use_quick_compilation(quick_compilation):
    """Turn off XLA optimizations in every test of this directory."""


class UnpackedRecords:
    """One record per row: no packing, no shared prompts, no sharding.

    Entry t of an array [records, T] belongs to the prediction of token t + 1.
    """

    def __init__(self, records, references=None):
        length = max(len(record.tokens) for record in records)
        self.tokens = np.stack([np.pad(record.tokens, (0, length - len(record.tokens))) for record in records])
        masks = [np.pad(record.action_mask, (0, length - len(record.tokens))) for record in records]
        self.mask = np.stack(masks)[:, 1:]
        self.rewards = self.scatter([record.rewards for record in records])
        self.reference = None
        if references is not None:
            self.reference = TokenStats(*(self.scatter([pair[k] for pair in references]) for k in (0, 1)))

    def scatter(self, action_values):
        """Values per action -> [records, T], 0 at other tokens."""
        out = np.zeros(self.mask.shape, np.float32)
        for row, (mask, values) in enumerate(zip(self.mask, action_values, strict=True)):
            out[row, mask] = values
        return out

    def statistics(self, model, params) -> TokenStats:
        """Token statistics of every token, with `lse2`, computed from full logits."""
        logits = model.logits(params, self.tokens)[:, :-1]
        stats = jax.vmap(token_stats_from_logits)(logits, self.tokens[:, 1:])
        return stats._replace(lse2=jax.nn.logsumexp(2 * logits, axis=-1))


def max_relative_error(actual, expected) -> float:
    """Largest relative L2 error over the leaves of two trees."""
    errors = jax.tree.map(
        lambda a, b: np.linalg.norm(np.asarray(a) - np.asarray(b)) / np.linalg.norm(np.asarray(b)), actual, expected
    )
    return max(jax.tree.leaves(errors))


@pytest.fixture(scope="session")
def relative_error():
    return max_relative_error


@pytest.fixture(scope="session")
def unpacked_records():
    return UnpackedRecords


@pytest.fixture(scope="session")
def make_records():
    return random_records


@pytest.fixture(scope="session")
def records():
    return random_records(0)


@pytest.fixture(scope="session")
def model():
    return Model.from_config(CONFIG)


@pytest.fixture(scope="session")
def host_params(model):
    """Parameters as numpy arrays, because an update donates the arrays of its state."""
    rng = np.random.default_rng(1)

    def random_leaf(path, leaf):
        mean = 1 if "norm" in jax.tree_util.keystr(path) else 0
        return rng.normal(mean, 0.2, leaf.shape).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(random_leaf, model.abstract_params())


@pytest.fixture(scope="session")
def get_mesh():
    """Cached `make_mesh(sizes)`; None for None."""
    meshes = {None: None}

    def get(sizes):
        return meshes[sizes] if sizes in meshes else meshes.setdefault(sizes, make_mesh(sizes))

    return get


@pytest.fixture(scope="session")
def model_on_mesh(model, host_params, get_mesh):
    """(model, new copy of the parameters) on a mesh of the given sizes."""

    def shard(sizes=None):
        sharded_model = dataclasses.replace(model, mesh=get_mesh(sizes))
        if sizes is None:
            return sharded_model, jax.tree.map(jnp.array, host_params)
        # Copy inside a computation, so that no array shares memory with the host's parameters.
        shardings = jax.tree.map(lambda leaf: leaf.sharding, sharded_model.abstract_params())
        return sharded_model, jax.jit(lambda tree: jax.tree.map(jnp.copy, tree), out_shardings=shardings)(host_params)

    return shard


@pytest.fixture
def make_buffer(tmp_path):
    """A buffer of the given records, in `shards` shards."""

    def make(records, name="buffer", shards=1):
        buffer = Buffer.create(tmp_path / name)
        for indices in np.array_split(np.arange(len(records)), shards):
            buffer.append([records[index] for index in indices])
        return buffer

    return make
