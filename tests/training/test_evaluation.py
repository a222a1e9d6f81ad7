"""Estimates of reward and distance: against numbers computed whole, without any sampling."""

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
    """A number that any other text or row would change."""
    return row["bonus"] + zlib.crc32(text.encode()) % 97 / 97


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def model():
    return Model.from_config(CONFIG)


@pytest.fixture(scope="module")
def reference(model):
    random = np.random.default_rng(0)

    def leaf(path, shape):
        return jnp.asarray(random.normal(path[-1].key == "scale", 0.3, shape.shape), shape.dtype)

    return jax.tree.map_with_path(leaf, model.abstract_params())


@pytest.fixture(scope="module")
def policy(reference):
    random = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: leaf + jnp.asarray(random.normal(0, 0.06, leaf.shape), leaf.dtype), reference)


@pytest.fixture(scope="module")
def handle(model, reference):
    return Reference("the reference", lambda source: (model, reference), CONFIG.vocab_size)


@pytest.fixture(scope="module")
def prompts(tokenizer):
    return [encode_prompt(tokenizer, row["prompt"]) for row in ROWS]


@pytest.fixture(scope="module")
def logp(model):
    """`logp(params, sequences)`: float64[rows, V], of what follows each sequence."""
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
    """Three samples of four tokens at most, scored, and a greedy one."""
    return Evaluator(model, tokenizer, STOPS, ROWS, reward, 4, samples_per_prompt=3, prompts_in_flight=4, greedy=True)


@pytest.fixture(scope="module")
def evaluated(evaluator, policy, handle):
    return evaluator(policy, handle, KEY)


def divergence(policy_logp, reference_logp):
    return (np.exp(policy_logp) * (policy_logp - reference_logp)).sum(axis=1)


def test_a_policy_is_at_no_distance_from_itself(evaluator, reference, handle):
    for other in (handle, None):
        numbers = evaluator(reference, other, KEY).numbers
        assert abs(numbers["kl"]) < 1e-5 and abs(numbers["kl_stderr"]) < 1e-5


@pytest.mark.parametrize("row", [0, 3])
def test_kl_of_one_token_is_the_exact_one(model, tokenizer, policy, reference, handle, prompts, logp, row):
    exact = divergence(logp(policy, prompts[row : row + 1]), logp(reference, prompts[row : row + 1]))[0]
    evaluator = Evaluator(model, tokenizer, STOPS, ROWS[row : row + 1], None, 1, 1500, prompts_in_flight=1)
    numbers = evaluator(policy, handle, KEY).numbers
    assert abs(numbers["kl"] - exact) < 5 * numbers["kl_stderr"]
    # The bound above says something, in either direction.
    assert 0 < 10 * numbers["kl_stderr"] < exact
    assert numbers["length"] == 1


def test_kl_of_two_tokens_counts_what_follows_unless_it_stopped(
    model, tokenizer, policy, reference, handle, prompts, logp
):
    prompt = prompts[1]
    further = [token for token in range(CONFIG.vocab_size) if token not in STOPS]
    first = logp(policy, [prompt])
    continued = [[*prompt, token] for token in further]
    after = divergence(logp(policy, continued), logp(reference, continued))
    exact = divergence(first, logp(reference, [prompt]))[0] + (np.exp(first[0, further]) * after).sum()
    evaluator = Evaluator(model, tokenizer, STOPS, ROWS[1:2], None, 2, samples_per_prompt=1500, prompts_in_flight=1)
    numbers, samples, logratios, *_ = evaluator(policy, handle, KEY)
    assert abs(numbers["kl"] - exact) < 5 * numbers["kl_stderr"] < exact / 2
    assert numbers["kl"] == pytest.approx(logratios.mean())
    going_on = np.exp(first[0, further]).sum()
    assert numbers["length"] == pytest.approx(1 + going_on, abs=5 * np.sqrt(going_on * (1 - going_on) / 1500))
    assert len(samples) == 1500


def test_reward_and_its_error_are_those_of_the_samples(evaluator, evaluated):
    numbers, everything = evaluated.numbers, evaluator.shown(evaluated)
    samples = [row for row in everything if row["decoding"] == "sampled"]
    assert len(samples) == 12 and len(everything) == 16
    rewards = np.array([sample["reward"] for sample in samples])
    expected = [reward(row, sample["completion"]) for row, sample in zip(np.repeat(ROWS, 3), samples, strict=True)]
    np.testing.assert_allclose(rewards, expected, atol=1e-6)
    means = rewards.reshape(4, 3).mean(axis=1)
    assert numbers["reward"] == pytest.approx(means.mean(), abs=1e-6)
    # Answers to one prompt are not independent: the prompts are what was drawn.
    assert numbers["reward_stderr"] == pytest.approx(np.sqrt(means.var(ddof=1) / 4), abs=1e-6)
    assert len(set(rewards.round(4))) > 6
    assert numbers["accuracy"] == (rewards >= 1).mean() and 0 < numbers["accuracy"] < 1


def test_samples_show_the_prompt_as_the_model_reads_it(evaluator, evaluated, tokenizer, prompts):
    shown = [sample["prompt"] for sample in evaluator.shown(evaluated, samples=0)]
    assert shown == [tokenizer.decode(prompt) for prompt in prompts] == [f"<bos>{row['prompt']}" for row in ROWS]


def test_generations_are_shown_prompt_by_prompt_with_their_distance(evaluator, evaluated, policy, reference, logp):
    rows = evaluator.shown(evaluated, prompts=2, samples=2)
    assert [row["decoding"] for row in rows] == ["sampled", "sampled", "greedy"] * 2
    assert [row["prompt"] for row in rows] == [f"<bos>{ROWS[number]['prompt']}" for number in (0, 0, 0, 1, 1, 1)]
    records = [*evaluated.records[:2], evaluated.greedy[0], *evaluated.records[3:5], evaluated.greedy[1]]
    for row, record in zip(rows, records, strict=True):
        assert row["tokens"] == len(record.rewards) and row["reward"] == record.rewards.sum()
        tokens, actions = list(map(int, record.tokens)), len(record.rewards)
        before = [tokens[:end] for end in range(len(tokens) - actions, len(tokens))]
        taken = (np.arange(actions), tokens[-actions:])
        exact = (logp(policy, before)[taken] - logp(reference, before)[taken]).sum()
        assert row["logratio"] == pytest.approx(exact, abs=1e-3) and abs(exact) > 1e-3


def test_a_part_of_the_prompts_gives_what_the_whole_gave_for_them(evaluator, evaluated, policy, handle):
    part = evaluator(policy, handle, KEY, prompts=2)
    assert part.records == evaluated.records[:6] and part.greedy == evaluated.greedy[:2]
    np.testing.assert_allclose(part.logratios, evaluated.logratios[:6], atol=1e-4)
    assert part.numbers["kl"] == pytest.approx(part.logratios.mean())
    rewards = [record.rewards.sum() for record in evaluated.records[:6]]
    assert part.numbers["reward"] == pytest.approx(np.mean(rewards), abs=1e-6)


def test_greedy_reward_is_that_of_the_most_likely_tokens(evaluated, policy, prompts, tokenizer, logp):
    total = 0.0
    for row, prompt in zip(ROWS, prompts, strict=True):
        tokens = list(prompt)
        while len(tokens) < len(prompt) + 4 and (len(tokens) == len(prompt) or tokens[-1] not in STOPS):
            tokens.append(int(logp(policy, [tokens])[0].argmax()))
        completion = tokens[len(prompt) : -1 if tokens[-1] in STOPS else None]
        total += reward(row, tokenizer.decode(completion, skip_special_tokens=True))
    assert evaluated.numbers["greedy_reward"] == pytest.approx(total / len(ROWS), abs=1e-6)


def test_the_error_is_taken_over_prompts(evaluated):
    kl = evaluated.logratios.reshape(4, 3).mean(axis=1)
    assert evaluated.numbers["kl"] == pytest.approx(kl.mean())
    assert evaluated.numbers["kl_stderr"] == pytest.approx(kl.std(ddof=1) / 2)


def test_numbers_are_plain_and_come_again(evaluator, evaluated, policy, handle):
    numbers = evaluated.numbers
    scores = {prefix + name for prefix in ("", "greedy_") for name in ("reward", "accuracy")}
    expected = scores | {"length", "kl", "kl_stderr"} | {f"{name}_stderr" for name in scores}
    assert set(numbers) == expected
    assert {type(value) for value in numbers.values()} == {float}
    again = evaluator(policy, handle, KEY)
    assert again.numbers == numbers and again.records == evaluated.records
    other = evaluator(policy, handle, jax.random.key(9)).numbers
    assert other["kl"] != numbers["kl"] and other["greedy_reward"] == numbers["greedy_reward"]


def test_without_a_reward_only_the_distance_is_measured(model, tokenizer, policy, handle):
    evaluator = Evaluator(model, tokenizer, STOPS, ROWS[:1], None, 1, prompts_in_flight=1, greedy=True)
    found = evaluator(policy, handle, KEY)
    numbers, records, logratios = found[:3]
    assert set(numbers) == {"length", "kl", "kl_stderr"} and numbers["kl"] == pytest.approx(logratios[0]) != 0
    # One sample has no spread to estimate an error from.
    assert numbers["kl_stderr"] == 0 and len(records) == 1
    # What nothing scores can still be looked at, the greedy answer too.
    assert [(row["decoding"], row["reward"]) for row in evaluator.shown(found)] == [("sampled", None), ("greedy", None)]


def test_a_reference_of_another_vocabulary_is_refused(evaluator, policy, model, reference):
    with pytest.raises(UserError, match="vocabulary of 264 tokens and the policy one of 99"):
        evaluator(policy, Reference("other", lambda source: (model, reference), 99), KEY)


def test_nothing_to_evaluate_on_is_refused(model, tokenizer, policy):
    with pytest.raises(UserError, match="no prompt"):
        Evaluator(model, tokenizer, STOPS, [], None, 1)(policy, None, KEY)
