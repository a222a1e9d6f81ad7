"""A small decoder with sharp opinions, and its uncached forward pass in plain numpy terms."""

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
def draw_params():
    """`draw_params(model, seed)`: parameters of the config's `initializer_range`, drawn with numpy for speed."""

    def draw(model, seed):
        random = np.random.default_rng(seed)

        def leaf(path, shape):
            scale = path[-1].key == "scale"
            return jnp.asarray(random.normal(scale, model.config.initializer_range, shape.shape), shape.dtype)

        return jax.tree.map_with_path(leaf, model.abstract_params())

    return draw


@pytest.fixture(scope="session")
def params(model, draw_params):
    return draw_params(model, 3)


@pytest.fixture(scope="session")
def prompts():
    """Token lists of lengths 1 to 30."""
    random = np.random.default_rng(0)
    return [random.integers(0, CONFIG.vocab_size, length).tolist() for length in (3, 1, 7, 30, 5, 12)]


@pytest.fixture(scope="session")
def uncached(model):
    """Functions of the forward pass without a cache, each sequence alone and padded on the right.

    `next_logits(params, tokens)`: float64[N, V], row i being the raw logits of what follows token i.
    `greedy(params, prompt, count)`: argmax after argmax. `statistics(params, prompt, tokens)`: raw (logp, lse) of each.
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
