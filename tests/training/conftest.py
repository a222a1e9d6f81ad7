"""A tiny decoder, groups of random records with rewards, and plain computations on one record at a time."""

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
    """Groups of unequal size and length, one prompt each; environment tokens stand between the actions."""
    rng = np.random.default_rng(seed)
    records = []
    for number, size in enumerate(sizes):
        prompt = rng.integers(CONFIG.vocab_size, size=rng.integers(2, 9))
        for _ in range(size):
            own = rng.integers(CONFIG.vocab_size, size=rng.integers(2, 10))
            mask = rng.random(len(own)) < 0.8
            mask[-1] = True
            records.append(
                Record(
                    tokens=np.concatenate([prompt, own]),
                    action_mask=np.concatenate([np.zeros(len(prompt), bool), mask]),
                    rewards=rng.normal(size=int(mask.sum())).astype(np.float32),
                    group=f"group {number}",
                )
            )
    return records


@pytest.fixture(scope="module", autouse=True)
def quickly(quick_compilation):
    """Every test here compiles quickly."""


class Dense:
    """Records one to a row, on a token axis with everything in it: no packing, no sharing, no sharding.

    Entry t of an array [records, T] describes the prediction of token t + 1.
    """

    def __init__(self, records, references=None):
        length = max(len(record.tokens) for record in records)
        self.tokens = np.stack([np.pad(record.tokens, (0, length - len(record.tokens))) for record in records])
        masks = [np.pad(record.action_mask, (0, length - len(record.tokens))) for record in records]
        self.mask = np.stack(masks)[:, 1:]
        self.rewards = self.spread([record.rewards for record in records])
        self.reference = None
        if references is not None:
            self.reference = TokenStats(*(self.spread([pair[k] for pair in references]) for k in (0, 1)))

    def spread(self, columns):
        """Numbers per action -> [records, T], 0 off the actions."""
        out = np.zeros(self.mask.shape, np.float32)
        for row, (mask, values) in enumerate(zip(self.mask, columns, strict=True)):
            out[row, mask] = values
        return out

    def statistics(self, model, params) -> TokenStats:
        """Of every token of every record, `lse2` with them, from whole logits."""
        logits = model.logits(params, self.tokens)[:, :-1]
        stats = jax.vmap(token_stats_from_logits)(logits, self.tokens[:, 1:])
        return stats._replace(lse2=jax.nn.logsumexp(2 * logits, axis=-1))


def relative_error(found, expected) -> float:
    """Largest relative L2 distance over the leaves of two trees."""
    distances = jax.tree.map(
        lambda a, b: np.linalg.norm(np.asarray(a) - np.asarray(b)) / np.linalg.norm(np.asarray(b)), found, expected
    )
    return max(jax.tree.leaves(distances))


@pytest.fixture(scope="session")
def relative():
    return relative_error


@pytest.fixture(scope="session")
def dense():
    return Dense


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
    """As numpy arrays, for an update gives away the arrays that it was started with."""
    rng = np.random.default_rng(1)

    def draw(path, leaf):
        mean = 1 if "norm" in jax.tree_util.keystr(path) else 0
        return rng.normal(mean, 0.2, leaf.shape).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, model.abstract_params())


@pytest.fixture(scope="session")
def requested_mesh():
    """The mesh of a text, None for None; equal texts give the same mesh."""
    meshes = {None: None}

    def get(text):
        return meshes[text] if text in meshes else meshes.setdefault(text, make_mesh(text))

    return get


@pytest.fixture(scope="session")
def on_mesh(model, host_params, requested_mesh):
    """(model, fresh parameters) on the mesh of a text."""

    def place(text=None):
        placed = dataclasses.replace(model, mesh=requested_mesh(text))
        if text is None:
            return placed, jax.tree.map(jnp.array, host_params)
        # Made inside a computation, so that no array shares its memory with the host's copy.
        shardings = jax.tree.map(lambda leaf: leaf.sharding, placed.abstract_params())
        return placed, jax.jit(lambda tree: jax.tree.map(jnp.copy, tree), out_shardings=shardings)(host_params)

    return place


@pytest.fixture
def make_buffer(tmp_path):
    """A buffer of these records in so many shards."""

    def make(records, name="buffer", shards=1):
        buffer = Buffer.create(tmp_path / name)
        for part in np.array_split(np.arange(len(records)), shards):
            buffer.append([records[place] for place in part])
        return buffer

    return make
