"""The real weights of SmolLM2-135M-Instruct against transformers; fetches them on the first run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from shiq_jax.data.fetch import smollm2
from shiq_jax.models import fingerprint, load_hf, save_hf
from shiq_jax.sharding import make_mesh

pytestmark = pytest.mark.slow

PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):",
    "Once upon a time, in a small village,",
    "The three laws of thermodynamics state that",
    "2 + 2 =",
    "To bake bread you need flour,",
    "In 1969, the first humans",
    "SELECT name FROM users WHERE",
    "Dear Sir or Madam,",
    "The opposite of hot is",
]
NEW = 32


@pytest.fixture(scope="module")
def directory():
    return smollm2()


@pytest.fixture(scope="module")
def theirs(directory):
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def ours(directory):
    return load_hf(directory)


@pytest.fixture(scope="module")
def prompts(directory):
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    return [tokenizer(text)["input_ids"] for text in PROMPTS]


def greedy(model, params, prompts: list[list[int]]) -> np.ndarray:
    """The NEW most likely tokens after each prompt, decoded together from a left-padded cache."""
    width = max(map(len, prompts))
    tokens = jnp.asarray([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    valid = jnp.asarray([[False] * (width - len(prompt)) + [True] * len(prompt) for prompt in prompts])
    lengths = valid.sum(1)

    @jax.jit
    def run(params):
        cache = model.init_cache(len(prompts), width + NEW)
        hidden, cache = model.extend(params, cache, tokens, jnp.maximum(jnp.cumsum(valid, 1) - 1, 0), valid, 0)

        def step(carry, index):
            last, cache = carry
            best = jnp.argmax(model.project(params, last), -1)
            there = jnp.ones((len(prompts), 1), bool)
            hidden, cache = model.extend(params, cache, best[:, None], (lengths + index)[:, None], there, width + index)
            return (hidden[:, 0], cache), best

        return jax.lax.scan(step, (hidden[:, -1], cache), jnp.arange(NEW))[1].T

    return np.asarray(run(params))


def test_logits_are_those_of_transformers(theirs, ours, prompts):
    model, params = ours
    logits = jax.jit(model.logits)
    width = max(map(len, prompts))
    for prompt in prompts:
        with torch.no_grad():
            expected = theirs(torch.tensor([prompt])).logits[0].numpy()
        found = logits(params, jnp.asarray([prompt + [0] * (width - len(prompt))]))[0, : len(prompt)]
        assert np.abs(found - expected).max() <= 1e-3


def test_the_same_greedy_tokens(theirs, ours, prompts):
    found = greedy(*ours, prompts)
    for prompt, tokens in zip(prompts, found, strict=True):
        inputs = torch.tensor([prompt])
        with torch.no_grad():
            expected = theirs.generate(
                inputs, attention_mask=torch.ones_like(inputs), do_sample=False, min_new_tokens=NEW, max_new_tokens=NEW,
                eos_token_id=None, repetition_penalty=1.0,
            )  # fmt: skip
        assert tokens.tolist() == expected[0, len(prompt) :].tolist()


def test_an_export_is_exact_from_any_mesh(directory, ours, tmp_path):
    model, params = load_hf(directory, mesh=make_mesh("fsdp=4,tensor=2"))
    assert fingerprint(params) == fingerprint(ours[1])
    save_hf(model, params, tmp_path)
    assert fingerprint(load_hf(tmp_path)[1]) == fingerprint(params)
    assert model.generation_config is not None
