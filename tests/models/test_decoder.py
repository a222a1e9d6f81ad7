"""The decoder against transformers, and its invariance to packing, rematerialization and depth."""

import dataclasses
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from shiq_jax.models import DecoderConfig, Model, load_hf
from shiq_jax.models.hf_names import entries

VARIANTS = ["untied", "tied", "biases", "odd heads", "llama3 rope", "linear rope"]


def random_tokens(model, rows: int, length: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, model.config.vocab_size, (rows, length))


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_match_transformers(variant, llama):
    reference, directory = llama(variant)
    model, params = load_hf(directory)
    tokens = random_tokens(model, 2, 70)
    with torch.no_grad():
        expected = reference(torch.tensor(tokens)).logits.numpy()
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(model.logits(params, jnp.asarray(tokens)), expected, atol=1e-4)


@pytest.mark.parametrize("variant", ["untied", "tied", "biases"])
def test_gradients_match_transformers(variant, llama):
    reference, directory = llama(variant)
    model, params = load_hf(directory)
    tokens = random_tokens(model, 2, 12)
    reference.zero_grad()
    logp = torch.log_softmax(reference(torch.tensor(tokens)).logits[:, :-1], -1)
    (-logp.gather(-1, torch.tensor(tokens[:, 1:, None])).mean()).backward()

    def loss(params):
        hidden = model.hidden(params, jnp.asarray(tokens))[:, :-1]
        return -model.token_stats(params, hidden, jnp.asarray(tokens[:, 1:])).logp.mean()

    grads = jax.jit(jax.grad(loss))(params)
    expected = {name: parameter.grad.numpy() for name, parameter in reference.named_parameters()}
    compared = set()
    for entry in entries(grads, model.config.num_layers):
        grad = grads
        for name in entry.path:
            grad = grad[name]
        for layer, name in enumerate(entry.names):
            tensor = entry.to_tensor(np.asarray(grad[layer] if entry.stacked else grad))
            assert np.linalg.norm(tensor - expected[name]) <= 1e-3 * np.linalg.norm(expected[name]) + 1e-7, name
            compared.add(name)
    assert compared == set(expected)


def pack_forest(sequences: list[list[int]], length: int):
    """A row with the prefix forest of the sequences, and each sequence's token indices; a deliberately naive packer."""
    tokens, positions, intervals, indices = [], [], [], []
    nodes: dict[tuple[int, ...], int] = {}
    for sequence in sorted(sequences):
        for depth in range(len(sequence)):
            prefix = tuple(sequence[: depth + 1])
            if prefix not in nodes:
                nodes[prefix] = len(tokens)
                tokens.append(sequence[depth])
                positions.append(depth)
                intervals.append([len(intervals), len(intervals) + 1])
            for ancestor in range(1, depth + 1):
                node = nodes[prefix[:ancestor]]
                intervals[node][1] = max(intervals[node][1], nodes[prefix] + 1)
    for sequence in sequences:
        indices.append([nodes[tuple(sequence[: depth + 1])] for depth in range(len(sequence))])
    padding = length - len(tokens)
    intervals += [[len(tokens) + i, len(tokens) + i + 1] for i in range(padding)]
    as_row = lambda x: jnp.asarray(x, jnp.int32)[None]  # noqa: E731
    return as_row(tokens + [0] * padding), as_row(positions + [0] * padding), as_row(intervals), indices


def test_packed_forest_matches_separate_sequences(llama):
    model, params = load_hf(llama("llama3 rope")[1])
    prompt, second_prompt = [5, 9, 9, 2], [7, 1, 30]
    sequences = [prompt + [3, 4, 5], prompt + [3, 4, 6, 8], prompt + [11], prompt]
    sequences += [second_prompt + [2, 2], second_prompt + [2, 5]]
    tokens, positions, intervals, indices = pack_forest(sequences, 24)
    assert len({node for nodes in indices for node in nodes}) == 16  # instead of 34 tokens
    hidden = jax.jit(model.hidden)
    row = hidden(params, tokens, positions, intervals)[0]
    for sequence, nodes in zip(sequences, indices, strict=True):
        expected = hidden(params, jnp.asarray([sequence + [0] * (8 - len(sequence))]))[0, : len(sequence)]
        np.testing.assert_allclose(row[jnp.asarray(nodes)], expected, atol=2e-5)


def test_positions_default_to_indices(random_params):
    model = Model.from_config(DecoderConfig(32, 16, 24, 2, 2))
    params = random_params(model)
    tokens = jnp.arange(10).reshape(2, 5)
    positions = jnp.broadcast_to(jnp.arange(5), (2, 5))
    hidden = jax.jit(model.hidden)
    explicit = hidden(params, tokens, positions)
    np.testing.assert_allclose(hidden(params, tokens), explicit, atol=1e-6)
    assert not np.allclose(hidden(params, tokens, 3 * positions), explicit, atol=1e-3)


def test_rematerialization_keeps_gradients(llama):
    model, params = load_hf(llama("biases")[1])
    tokens = jnp.asarray(random_tokens(model, 2, 9))
    programs, grads = {}, {}
    for remat in ("none", "dots", "full"):
        remat_model = dataclasses.replace(model, remat=remat)
        gradient = jax.grad(lambda params, model=remat_model: jnp.sum(jnp.sin(model.hidden(params, tokens))))
        programs[remat] = str(jax.make_jaxpr(gradient)(params))
        grads[remat] = jax.jit(gradient)(params)
    assert "remat" not in programs["none"] and "remat" in programs["dots"] and programs["dots"] != programs["full"]
    for remat in ("dots", "full"):
        chex.assert_trees_all_close(grads[remat], grads["none"], rtol=1e-4, atol=1e-5)


def test_program_size_is_independent_of_depth():
    def instructions(layers: int) -> int:
        model = Model.from_config(DecoderConfig(32, 16, 24, layers, 2))
        loss = jax.grad(lambda params, tokens: jnp.sum(model.hidden(params, tokens)))
        tokens = jax.ShapeDtypeStruct((2, 8), jnp.int32)
        program = jax.jit(loss).lower(model.abstract_params(), tokens).compile().as_text()
        return sum(" = " in line for line in program.splitlines())

    assert instructions(12) <= instructions(3)


def test_compute_dtype(llama):
    reference, directory = llama("untied")
    model, params = load_hf(directory, compute_dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    tokens = random_tokens(model, 2, 8)
    hidden = model.hidden(params, jnp.asarray(tokens))
    logits = model.project(params, hidden)
    stats = model.token_stats(params, hidden, jnp.asarray(tokens))
    assert (hidden.dtype, logits.dtype, stats.lse.dtype) == (jnp.bfloat16, jnp.float32, jnp.float32)
    np.testing.assert_allclose(stats.lse, jax.nn.logsumexp(logits, -1), atol=1e-5)
    with torch.no_grad():
        expected = reference(torch.tensor(tokens)).logits.numpy()
    relative_error = np.linalg.norm(logits - expected) / np.linalg.norm(expected)
    assert 1e-4 < relative_error < 0.05


def test_lowered_step_contains_the_stage_names():
    model = Model.from_config(DecoderConfig(32, 16, 24, 2, 2))
    tokens = jax.ShapeDtypeStruct((2, 8), jnp.int32)

    def loss(params, tokens):
        hidden = model.hidden(params, tokens)
        stats = model.token_stats(params, hidden, tokens)
        return jnp.sum(stats.logp) + jnp.sum(model.project(params, hidden))

    lowered = jax.jit(jax.grad(loss)).lower(model.abstract_params(), tokens).as_text(debug_info=True)
    for stage in ("embed", "attention", "mlp", "final_norm", "statistics", "unembedding"):
        assert re.search(rf'["/(]{stage}[/)]', lowered), stage
