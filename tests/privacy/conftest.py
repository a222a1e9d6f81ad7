"""Tiny decoders that cover every kind of parameter, and batches with one unit per row."""

import functools

import jax
import numpy as np
import pytest

from shiq_jax.models import DecoderConfig, Model
from shiq_jax.objectives import OBJECTIVES
from shiq_jax.replay import Buffer, Record, pack, pack_groups, plan
from shiq_jax.training.private_gradient import UnitLosses

SIZES = dict(vocab_size=29, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=4, num_kv_heads=2)
VARIANTS = {
    "tied": {"tie_word_embeddings": True},
    "untied": {},
    "biases": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "large vocabulary": {"vocab_size": 152, "tie_word_embeddings": True},
    "query and key norms": {"qk_norm": True, "head_dim": 6},
}
# Unit -> an objective with this unit.
UNITS = {"trajectory": "shiq", "pair": "dpo", "group": "vargrad"}


@pytest.fixture(scope="module", autouse=True)
def fast_compilation(quick_compilation):
    """Disable most XLA optimizations in this directory."""


@pytest.fixture(scope="session")
def make_record():
    """Make a record of a prompt and a random completion of fewer than `max_length` tokens, not all of them actions."""

    def make(rng, prompt, max_length: int, **fields) -> Record:
        completion = rng.integers(7, size=rng.integers(2, max_length))
        mask = rng.random(len(completion)) < 0.8
        mask[-1] = True
        return Record(
            tokens=np.concatenate([prompt, completion]),
            action_mask=np.concatenate([np.zeros(len(prompt), bool), mask]),
            rewards=rng.normal(size=int(mask.sum())).astype(np.float32),
            **fields,
        )

    return make


@pytest.fixture(scope="session")
def make_statistics():
    """Make random reference statistics for the actions of a buffer's records."""

    def make(buffer):
        rng = np.random.default_rng(3)
        counts = [len(buffer[index].rewards) for index in range(len(buffer))]
        return [tuple(rng.normal((-3, 4), 1, (count, 2)).astype(np.float32).T) for count in counts]

    return make


@pytest.fixture(scope="session")
def buffer(tmp_path_factory, make_record):
    """Groups of scored completions of a prompt, over few token ids, so that tokens repeat within a row."""
    rng, records = np.random.default_rng(0), []
    for index, size in enumerate((3, 2, 4, 2, 3, 2)):
        prompt = rng.integers(7, size=rng.integers(3, 7))
        records += [make_record(rng, prompt, 8, group=f"group {index}") for _ in range(size)]
    buffer = Buffer.create(tmp_path_factory.mktemp("replay") / "buffer")
    buffer.append(records)
    return buffer


@pytest.fixture(scope="session")
def references(buffer, make_statistics):
    return make_statistics(buffer)


@pytest.fixture(scope="session")
def make_batch(buffer, references):
    """Make a batch of all units of a kind, one per row; `rows_multiple` pads it with empty rows."""

    @functools.cache
    def make(unit: str, rows_multiple: int = 1):
        units = pack_groups(buffer, unit, unit != "trajectory")
        shape = plan(buffer, units, multiple=8)._replace(slots=1)
        return pack(units, buffer, shape, references={"reference": references}, rows_multiple=rows_multiple).batch

    return make


@pytest.fixture(scope="session")
def decoder():
    """Make (model, parameters) of a variant, with parameters large enough for every layer to matter."""

    @functools.cache
    def make(variant: str = "tied", **options):
        model = Model.from_config(DecoderConfig(**(SIZES | VARIANTS[variant])), **options)
        rng = np.random.default_rng(1)

        def init(path, leaf):
            mean = 1 if "norm" in jax.tree_util.keystr(path) else 0
            return rng.normal(mean, 0.3, leaf.shape).astype(leaf.dtype)

        return model, jax.tree_util.tree_map_with_path(init, model.abstract_params())

    return make


@pytest.fixture(scope="session")
def unit_losses():
    """Make the per-unit losses of a model for an objective with the given unit."""

    def make(model, unit: str, frozen=()):
        return UnitLosses(model, OBJECTIVES[UNITS[unit]].configure(beta=0.5), dict(frozen), {})

    # One object for equal models, so that tests share its compiled programs.
    cached = functools.cache(make)
    return lambda model, unit, frozen=(): make(model, unit, frozen) if frozen else cached(model, unit)


@pytest.fixture(scope="session")
def relative_error():
    """Compute the largest relative L2 distance over the leaves of two trees."""

    def compute(actual, expected) -> float:
        norms = jax.tree.map(
            lambda a, b: (np.linalg.norm(np.asarray(a, np.float64) - np.asarray(b, np.float64)), np.linalg.norm(b)),
            jax.device_get(actual), jax.device_get(expected),
        )  # fmt: skip
        pairs = jax.tree.leaves(norms, is_leaf=lambda node: isinstance(node, tuple))
        return max(distance / norm if norm else distance for distance, norm in pairs)

    return compute
