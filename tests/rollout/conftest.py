"""Fixtures: a small decoder with peaked distributions, and an uncached forward pass to compare with."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shiq_jax.models import DecoderConfig, Model

CONFIG = DecoderConfig(24, 16, 24, 2, 4, 2, max_positions=96, initializer_range=0.3)
WIDTH = 48


@pytest.fixture(scope="session")
def config():
    return CONFIG


@pytest.fixture(scope="session")
def model():
    return Model.from_config(CONFIG)


@pytest.fixture(scope="session")
def random_params():
    """`random_params(model, seed)`: parameters with the config's `initializer_range`, made with numpy for speed."""

    def make(model, seed):
        rng = np.random.default_rng(seed)

        def random_leaf(path, leaf):
            mean = path[-1].key == "scale"
            return jnp.asarray(rng.normal(mean, model.config.initializer_range, leaf.shape), leaf.dtype)

        return jax.tree.map_with_path(random_leaf, model.abstract_params())

    return make


@pytest.fixture(scope="session")
def params(model, random_params):
    return random_params(model, 3)


@pytest.fixture(scope="session")
def prompts():
    """Token lists of lengths 1 to 30."""
    rng = np.random.default_rng(0)
    return [rng.integers(0, CONFIG.vocab_size, length).tolist() for length in (3, 1, 7, 30, 5, 12)]


@pytest.fixture(scope="session")
def uncached(model):
    """The forward pass without a cache, one right-padded sequence at a time.

    `next_logits(params, tokens)`: float64[N, V], raw logits at every position.
    `greedy(params, prompt, count)`: greedy decoding.
    `statistics(params, prompt, tokens)`: raw (logp, lse) of each token of the completion.
    """
    forward = jax.jit(model.logits)

    def next_logits(params, tokens):
        row = np.zeros((1, WIDTH), np.int32)
        row[0, : len(tokens)] = tokens
        return np.asarray(forward(params, jnp.asarray(row))[0, : len(tokens)], np.float64)

    def greedy(params, prompt, count):
        tokens = list(prompt)
        for _ in range(count):
            tokens.append(int(next_logits(params, tokens)[-1].argmax()))
        return tokens[len(prompt) :]

    def statistics(params, prompt, tokens):
        logits = next_logits(params, [*prompt, *tokens])[len(prompt) - 1 : -1]
        lse = np.log(np.exp(logits).sum(axis=-1))
        return logits[np.arange(len(tokens)), tokens] - lse, lse

    return types.SimpleNamespace(next_logits=next_logits, greedy=greedy, statistics=statistics)
