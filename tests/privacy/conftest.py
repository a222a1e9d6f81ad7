"""Tiny decoders with everything that has parameters, and batches of which each row holds one unit."""

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
    "many words": {"vocab_size": 152, "tie_word_embeddings": True},
    "query and key norms": {"qk_norm": True, "head_dim": 6},
}
UNITS = {"trajectory": "shiq", "pair": "dpo", "group": "vargrad"}


@pytest.fixture(scope="module", autouse=True)
def quickly(quick_compilation):
    """Every test here compiles quickly."""


@pytest.fixture(scope="session")
def answer():
    """A record: a prompt and an answer, not all of whose tokens are actions; fewer than `below` of them."""

    def make(rng, prompt, below: int, **about) -> Record:
        own = rng.integers(7, size=rng.integers(2, below))
        mask = rng.random(len(own)) < 0.8
        mask[-1] = True
        return Record(
            tokens=np.concatenate([prompt, own]),
            action_mask=np.concatenate([np.zeros(len(prompt), bool), mask]),
            rewards=rng.normal(size=int(mask.sum())).astype(np.float32),
            **about,
        )

    return make


@pytest.fixture(scope="session")
def statistics_of():
    """What a reference might say of the actions of a buffer's records."""

    def make(buffer):
        rng = np.random.default_rng(3)
        counts = [len(buffer[number].rewards) for number in range(len(buffer))]
        return [tuple(rng.normal((-3, 4), 1, (count, 2)).astype(np.float32).T) for count in counts]

    return make


@pytest.fixture(scope="session")
def buffer(tmp_path_factory, answer):
    """A prompt and several answers with rewards, a group each; of few different tokens, so that some stand twice."""
    rng, records = np.random.default_rng(0), []
    for number, size in enumerate((3, 2, 4, 2, 3, 2)):
        prompt = rng.integers(7, size=rng.integers(3, 7))
        records += [answer(rng, prompt, 8, group=f"group {number}") for _ in range(size)]
    buffer = Buffer.create(tmp_path_factory.mktemp("replay") / "buffer")
    buffer.append(records)
    return buffer


@pytest.fixture(scope="session")
def references(buffer, statistics_of):
    return statistics_of(buffer)


@pytest.fixture(scope="session")
def batch_of(buffer, references):
    """A batch of all units of a kind, one to a row; rows_multiple adds rows without a unit."""

    @functools.cache
    def make(unit: str, rows_multiple: int = 1):
        drawn = pack_groups(buffer, unit, unit != "trajectory")
        shape = plan(buffer, drawn, multiple=8)._replace(slots=1)
        return pack(drawn, buffer, shape, references={"reference": references}, rows_multiple=rows_multiple).batch

    return make


@pytest.fixture(scope="session")
def decoder():
    """(model, parameters) of a variant, drawn so large that every part shows."""

    @functools.cache
    def make(variant: str = "tied", **options):
        model = Model.from_config(DecoderConfig(**(SIZES | VARIANTS[variant])), **options)
        rng = np.random.default_rng(1)

        def draw(path, leaf):
            mean = 1 if "norm" in jax.tree_util.keystr(path) else 0
            return rng.normal(mean, 0.3, leaf.shape).astype(leaf.dtype)

        return model, jax.tree_util.tree_map_with_path(draw, model.abstract_params())

    return make


@pytest.fixture(scope="session")
def example_losses():
    """The unit losses of a model, in the kind of unit that an objective has."""

    def make(model, unit: str, frozen=()):
        return UnitLosses(model, OBJECTIVES[UNITS[unit]].configure(beta=0.5), dict(frozen), {})

    # One object for equal models, so that tests share the programs that are compiled for it.
    shared = functools.cache(make)
    return lambda model, unit, frozen=(): make(model, unit, frozen) if frozen else shared(model, unit)


@pytest.fixture(scope="session")
def relative():
    """Largest relative L2 distance over the leaves of two trees."""

    def make(found, expected) -> float:
        norms = jax.tree.map(
            lambda a, b: (np.linalg.norm(np.asarray(a, np.float64) - np.asarray(b, np.float64)), np.linalg.norm(b)),
            jax.device_get(found), jax.device_get(expected),
        )  # fmt: skip
        pairs = jax.tree.leaves(norms, is_leaf=lambda node: isinstance(node, tuple))
        return max(far / size if size else far for far, size in pairs)

    return make
