"""SmolLM2-135M-Instruct against transformers; downloads the weights on the first run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from shiq_jax.models import fingerprint, load_hf, save_hf
from shiq_jax.rollout.generate import Sampler
from shiq_jax.rollout.sampling import Sampling
from shiq_jax.sharding import make_mesh
from shiq_jax.tasks.fetch import smollm2

pytestmark = pytest.mark.slow

PROMPTS = """\
The capital of France is
def fibonacci(n):
Once upon a time, in a small village,
The three laws of thermodynamics state that
2 + 2 =
To bake bread you need flour,
In 1969, the first humans
SELECT name FROM users WHERE
Dear Sir or Madam,
The opposite of hot is
Water boils at
import numpy as np
She opened the letter and
The largest planet of the solar system
A haiku about autumn:
for i in range(10):
The quick brown fox
My favourite book is
To whom it may concern: I am writing because
Photosynthesis is the process by which
The derivative of x squared is
Hello
Q: How many legs does a spider have?
Mix the eggs with the sugar, then
#include <stdio.h>
The president of the United States
One, two, three, four,
In the beginning
According to the weather forecast, tomorrow
Translate to Spanish: good morning
Roses are red,
The meeting begins at nine o'clock and everybody who wants to speak should
<html><head><title>
Mount Everest is
If it rains, we
A triangle with a base of 10 units and a height of 5 units has an area of
class Stack:
Sleep is important because
The train from Paris to Lyon
{"name": "Alice", "age":
Shakespeare wrote
To make a cup of tea, first
The chemical symbol of gold is
Yesterday I met an old friend whom I had not seen for more than ten years, and we
Breaking news:
There are seven days in
git commit -m
Bees make
The first step in solving a problem is to
Thank you for""".split("\n")
NEW_TOKENS = 12


@pytest.fixture(scope="module")
def directory():
    return smollm2()


@pytest.fixture(scope="module")
def reference(directory):
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def model_and_params(directory):
    return load_hf(directory)


@pytest.fixture(scope="module")
def prompts(directory):
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    return [tokenizer(text)["input_ids"] for text in PROMPTS]


def test_logits_match_transformers(reference, model_and_params, prompts):
    model, params = model_and_params
    logits = jax.jit(model.logits)
    width = max(map(len, prompts))
    for prompt in prompts[::5]:
        with torch.no_grad():
            expected = reference(torch.tensor([prompt])).logits[0].numpy()
        actual = logits(params, jnp.asarray([prompt + [0] * (width - len(prompt))]))[0, : len(prompt)]
        assert np.abs(actual - expected).max() <= 1e-3


def test_greedy_matches_transformers(reference, model_and_params, prompts):
    assert len(prompts) == 50 and len(set(map(len, prompts))) > 10
    model, params = model_and_params
    sample = Sampler(model, Sampling(temperature=0, max_tokens=NEW_TOKENS), (), prompts_in_flight=25)
    actual = [answer["tokens"].tolist() for (answer,) in sample(params, prompts, jax.random.key(0))]
    settings = dict(
        do_sample=False, min_new_tokens=NEW_TOKENS, max_new_tokens=NEW_TOKENS, eos_token_id=None, pad_token_id=0
    )
    expected = {}
    # Batches of prompts of equal length need no padding.
    for length in set(map(len, prompts)):
        batch = torch.tensor([prompt for prompt in prompts if len(prompt) == length])
        with torch.no_grad():
            out = reference.generate(batch, attention_mask=torch.ones_like(batch), repetition_penalty=1.0, **settings)
        expected |= {tuple(row[:length]): row[length:] for row in out.tolist()}
    assert actual == [expected[tuple(prompt)] for prompt in prompts]


def test_sharded_round_trip_is_exact(directory, model_and_params, tmp_path):
    model, params = load_hf(directory, mesh=make_mesh("fsdp=4,tensor=2"))
    assert fingerprint(params) == fingerprint(model_and_params[1])
    save_hf(model, params, tmp_path)
    assert fingerprint(load_hf(tmp_path)[1]) == fingerprint(params)
    assert model.generation_config is not None
