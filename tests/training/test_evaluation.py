"""Evaluation: reward and KL estimates against values computed exactly from the full distribution."""

import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shiq_jax.data.chat import encode_prompt
from shiq_jax.errors import UserError
from shiq_jax.models import DecoderConfig, Model
from shiq_jax.tasks.tiny import tiny_tokenizer
from shiq_jax.training.evaluation import Evaluator
from shiq_jax.training.reference import Reference

CONFIG = DecoderConfig(264, 16, 24, 2, 4, 2, max_positions=64, initializer_range=0.3)
ROWS = [{"prompt": text, "bonus": bonus} for text, bonus in (("sort 31:", 0.0), ("2", 1.0), ("abc ", -2.0), ("b", 0.5))]
STOPS = tuple(range(60))
WIDTH = 16
KEY = jax.random.key(1)


def reward(row, text):
    """A reward that depends on every character of the text and on the row."""
    return row["bonus"] + zlib.crc32(text.encode()) % 97 / 97


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def model():
    return Model.from_config(CONFIG)


@pytest.fixture(scope="module")
def reference(model):
    rng = np.random.default_rng(0)

    def random_leaf(path, leaf):
        return jnp.asarray(rng.normal(path[-1].key == "scale", 0.3, leaf.shape), leaf.dtype)

    return jax.tree.map_with_path(random_leaf, model.abstract_params())


@pytest.fixture(scope="module")
def policy(reference):
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: leaf + jnp.asarray(rng.normal(0, 0.06, leaf.shape), leaf.dtype), reference)


@pytest.fixture(scope="module")
def handle(model, reference):
    return Reference("the reference", lambda source: (model, reference), CONFIG.vocab_size)


@pytest.fixture(scope="module")
def prompts(tokenizer):
    return [encode_prompt(tokenizer, row["prompt"]) for row in ROWS]


@pytest.fixture(scope="module")
def logp(model):
    """`logp(params, sequences)`: float64[rows, V], next-token log-probabilities of each sequence."""
    forward = jax.jit(model.logits)

    def compute(params, sequences):
        rows, out = np.zeros((len(sequences), WIDTH), np.int32), []
        for row, sequence in zip(rows, sequences, strict=True):
            row[: len(sequence)] = sequence
        for start in range(0, len(rows), 4):
            chunk = np.zeros((4, WIDTH), np.int32)
            chunk[: len(rows) - start] = rows[start : start + 4]
            out.append(np.asarray(forward(params, jnp.asarray(chunk)), np.float64)[: len(rows) - start])
        last = np.concatenate(out)[np.arange(len(rows)), [len(sequence) - 1 for sequence in sequences]]
        return last - np.log(np.exp(last).sum(axis=1, keepdims=True))

    return compute


@pytest.fixture(scope="module")
def evaluator(model, tokenizer):
    """Three samples of at most four tokens and a greedy answer per prompt, with a reward."""
    return Evaluator(model, tokenizer, STOPS, ROWS, reward, 4, samples_per_prompt=3, prompts_in_flight=4, greedy=True)


@pytest.fixture(scope="module")
def evaluated(evaluator, policy, handle):
    return evaluator(policy, handle, KEY)


def divergence(policy_logp, reference_logp):
    return (np.exp(policy_logp) * (policy_logp - reference_logp)).sum(axis=1)


def test_kl_of_the_reference_is_zero(evaluator, reference, handle):
    for kl_reference in (handle, None):
        metrics = evaluator(reference, kl_reference, KEY).metrics
        assert abs(metrics["kl"]) < 1e-5 and abs(metrics["kl_stderr"]) < 1e-5


@pytest.mark.parametrize("row", [0, 3])
def test_kl_of_one_token_is_exact(model, tokenizer, policy, reference, handle, prompts, logp, row):
    exact = divergence(logp(policy, prompts[row : row + 1]), logp(reference, prompts[row : row + 1]))[0]
    evaluator = Evaluator(model, tokenizer, STOPS, ROWS[row : row + 1], None, 1, 1500, prompts_in_flight=1)
    metrics = evaluator(policy, handle, KEY).metrics
    assert abs(metrics["kl"] - exact) < 5 * metrics["kl_stderr"]
    # The standard error is small enough for the comparison to be meaningful.
    assert 0 < 10 * metrics["kl_stderr"] < exact
    assert metrics["length"] == 1


def test_kl_of_two_tokens_ends_at_stop_tokens(model, tokenizer, policy, reference, handle, prompts, logp):
    prompt = prompts[1]
    continuing = [token for token in range(CONFIG.vocab_size) if token not in STOPS]
    first_logp = logp(policy, [prompt])
    continuations = [[*prompt, token] for token in continuing]
    second_kl = divergence(logp(policy, continuations), logp(reference, continuations))
    first_kl = divergence(first_logp, logp(reference, [prompt]))[0]
    exact = first_kl + (np.exp(first_logp[0, continuing]) * second_kl).sum()
    evaluator = Evaluator(model, tokenizer, STOPS, ROWS[1:2], None, 2, samples_per_prompt=1500, prompts_in_flight=1)
    metrics, samples, logratios, *_ = evaluator(policy, handle, KEY)
    assert abs(metrics["kl"] - exact) < 5 * metrics["kl_stderr"] < exact / 2
    assert metrics["kl"] == pytest.approx(logratios.mean())
    p_continue = np.exp(first_logp[0, continuing]).sum()
    assert metrics["length"] == pytest.approx(1 + p_continue, abs=5 * np.sqrt(p_continue * (1 - p_continue) / 1500))
    assert len(samples) == 1500


def test_reward_and_its_standard_error_match_the_samples(evaluator, evaluated):
    metrics, generations = evaluated.metrics, evaluator.generations(evaluated)
    samples = [row for row in generations if row["decoding"] == "sampled"]
    assert len(samples) == 12 and len(generations) == 16
    rewards = np.array([sample["reward"] for sample in samples])
    expected = [reward(row, sample["completion"]) for row, sample in zip(np.repeat(ROWS, 3), samples, strict=True)]
    np.testing.assert_allclose(rewards, expected, atol=1e-6)
    means = rewards.reshape(4, 3).mean(axis=1)
    assert metrics["reward"] == pytest.approx(means.mean(), abs=1e-6)
    # Answers to one prompt are not independent, so the standard error is over prompts.
    assert metrics["reward_stderr"] == pytest.approx(np.sqrt(means.var(ddof=1) / 4), abs=1e-6)
    assert len(set(rewards.round(4))) > 6
    assert metrics["accuracy"] == (rewards >= 1).mean() and 0 < metrics["accuracy"] < 1


def test_generations_include_special_tokens_of_the_prompt(evaluator, evaluated, tokenizer, prompts):
    texts = [row["prompt"] for row in evaluator.generations(evaluated, samples=0)]
    assert texts == [tokenizer.decode(prompt) for prompt in prompts] == [f"<bos>{row['prompt']}" for row in ROWS]


def test_generations_are_ordered_by_prompt_and_have_logratios(evaluator, evaluated, policy, reference, logp):
    rows = evaluator.generations(evaluated, prompts=2, samples=2)
    assert [row["decoding"] for row in rows] == ["sampled", "sampled", "greedy"] * 2
    assert [row["prompt"] for row in rows] == [f"<bos>{ROWS[index]['prompt']}" for index in (0, 0, 0, 1, 1, 1)]
    records = [*evaluated.records[:2], evaluated.greedy[0], *evaluated.records[3:5], evaluated.greedy[1]]
    for row, record in zip(rows, records, strict=True):
        assert row["tokens"] == len(record.rewards) and row["reward"] == record.rewards.sum()
        tokens, actions = list(map(int, record.tokens)), len(record.rewards)
        prefixes = [tokens[:end] for end in range(len(tokens) - actions, len(tokens))]
        taken = (np.arange(actions), tokens[-actions:])
        exact = (logp(policy, prefixes)[taken] - logp(reference, prefixes)[taken]).sum()
        assert row["logratio"] == pytest.approx(exact, abs=1e-3) and abs(exact) > 1e-3


def test_samples_do_not_depend_on_the_number_of_prompts(evaluator, evaluated, policy, handle):
    part = evaluator(policy, handle, KEY, prompts=2)
    assert part.records == evaluated.records[:6] and part.greedy == evaluated.greedy[:2]
    np.testing.assert_allclose(part.logratios, evaluated.logratios[:6], atol=1e-4)
    assert part.metrics["kl"] == pytest.approx(part.logratios.mean())
    rewards = [record.rewards.sum() for record in evaluated.records[:6]]
    assert part.metrics["reward"] == pytest.approx(np.mean(rewards), abs=1e-6)


def test_greedy_reward_matches_argmax_decoding(evaluated, policy, prompts, tokenizer, logp):
    total = 0.0
    for row, prompt in zip(ROWS, prompts, strict=True):
        tokens = list(prompt)
        while len(tokens) < len(prompt) + 4 and (len(tokens) == len(prompt) or tokens[-1] not in STOPS):
            tokens.append(int(logp(policy, [tokens])[0].argmax()))
        completion = tokens[len(prompt) : -1 if tokens[-1] in STOPS else None]
        total += reward(row, tokenizer.decode(completion, skip_special_tokens=True))
    assert evaluated.metrics["greedy_reward"] == pytest.approx(total / len(ROWS), abs=1e-6)


def test_standard_error_is_over_prompts(evaluated):
    kl = evaluated.logratios.reshape(4, 3).mean(axis=1)
    assert evaluated.metrics["kl"] == pytest.approx(kl.mean())
    assert evaluated.metrics["kl_stderr"] == pytest.approx(kl.std(ddof=1) / 2)


def test_metrics_are_floats_and_reproducible(evaluator, evaluated, policy, handle):
    metrics = evaluated.metrics
    scores = {prefix + name for prefix in ("", "greedy_") for name in ("reward", "accuracy")}
    expected = scores | {"length", "kl", "kl_stderr"} | {f"{name}_stderr" for name in scores}
    assert set(metrics) == expected
    assert {type(value) for value in metrics.values()} == {float}
    repeated = evaluator(policy, handle, KEY)
    assert repeated.metrics == metrics and repeated.records == evaluated.records
    other_key = evaluator(policy, handle, jax.random.key(9)).metrics
    assert other_key["kl"] != metrics["kl"] and other_key["greedy_reward"] == metrics["greedy_reward"]


def test_only_kl_without_a_reward(model, tokenizer, policy, handle):
    evaluator = Evaluator(model, tokenizer, STOPS, ROWS[:1], None, 1, prompts_in_flight=1, greedy=True)
    result = evaluator(policy, handle, KEY)
    metrics, records, logratios = result[:3]
    assert set(metrics) == {"length", "kl", "kl_stderr"} and metrics["kl"] == pytest.approx(logratios[0]) != 0
    # A single sample gives no estimate of the standard error.
    assert metrics["kl_stderr"] == 0 and len(records) == 1
    generations = evaluator.generations(result)
    assert [(row["decoding"], row["reward"]) for row in generations] == [("sampled", None), ("greedy", None)]


def test_reference_with_another_vocabulary_is_rejected(evaluator, policy, model, reference):
    with pytest.raises(UserError, match="vocabulary of 264 tokens and the policy one of 99"):
        evaluator(policy, Reference("other", lambda source: (model, reference), 99), KEY)


def test_evaluation_without_prompts_is_rejected(model, tokenizer, policy):
    with pytest.raises(UserError, match="no prompts"):
        Evaluator(model, tokenizer, STOPS, [], None, 1)(policy, None, KEY)
