"""Records of sampled answers: what was said, what it earned, and where it came from."""

import datetime
import json
import types

import jax
import numpy as np
import pytest

from shiq_jax.data.chat import encode_prompt
from shiq_jax.errors import UserError
from shiq_jax.models import DecoderConfig, Model
from shiq_jax.replay.records import validate
from shiq_jax.rollout.collect import collect, decode, in_order
from shiq_jax.rollout.generate import Sampler
from shiq_jax.rollout.sampling import Sampling
from shiq_jax.tasks.tiny import tiny_tokenizer

pytestmark = pytest.mark.usefixtures("quick_compilation")

ROWS = [
    {"id": "first", "prompt": "sort 31:", "answer": "13", "nested": {"numbers": [1, 2.5, None], "text": "zwölf ☃"}},
    {"prompt": [{"role": "user", "content": "hi"}], "answer": "yes"},
    {"prompt": "sort 987654321:", "answer": "123456789"},
]
KEY = jax.random.key(5)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def scripted(tokenizer):
    """`scripted(texts)`: a sampler that gives these answers to each prompt, and notes what it was asked."""

    def make(texts):
        def stream(params, prompts, key, first):
            sampler.asked = (params, prompts, key, first)
            # The last prompt is finished first.
            for number in reversed(range(len(prompts))):
                yield number, [answer(text) for text in texts[number]]

        def answer(text):
            tokens = np.array(tokenizer(text, add_special_tokens=False).input_ids)
            logp = -np.arange(1.0, len(tokens) + 1)
            return {"tokens": tokens, "logp": logp, "lse": logp * 2, "behaviour_logp": logp * 3}

        sampler = types.SimpleNamespace(stream=stream)
        return sampler

    return make


def gathered(*args, **settings):
    return in_order(collect(*args, **settings))


@pytest.fixture(scope="module")
def records(scripted, tokenizer):
    texts = [["13<eos>", "1", "31<|im_end|>"], ["yes<eos>", "no", "<eos>"], ["12", "ü", "3 <eos>"]]
    sampler = scripted(texts)

    def reward(row, text):
        return len(text) + 10 * (text == row["answer"])

    out = gathered(sampler, "weights", tokenizer, ROWS, reward, key="key", stop_tokens=(2, 4), first=7)
    assert sampler.asked == ("weights", [encode_prompt(tokenizer, row["prompt"]) for row in ROWS], "key", 7)
    return out


def test_the_sampler_is_asked_once_for_all_and_order_is_kept(records, tokenizer):
    said = [tokenizer.decode(record.tokens[record.action_mask].tolist()) for record in records]
    assert said == ["13<eos>", "1", "31<|im_end|>", "yes<eos>", "no", "<eos>", "12", "ü", "3 <eos>"]


def test_a_record_is_prompt_then_actions(records, tokenizer):
    for record, row in zip(records, np.repeat(ROWS, 3), strict=True):
        prompt = encode_prompt(tokenizer, row["prompt"])
        assert record.tokens[: len(prompt)].tolist() == prompt
        assert record.action_mask.tolist() == [False] * len(prompt) + [True] * (len(record.tokens) - len(prompt))
        validate(record, vocab_size=264)


def test_the_reward_stands_on_the_last_action(records):
    # The lengths of the texts, without the tokens that ended them, and 10 for a right answer.
    assert [record.rewards[-1] for record in records] == [12, 1, 2, 13, 2, 0, 2, 1, 2]
    assert all(not record.rewards[:-1].any() and len(record.rewards) == record.action_mask.sum() for record in records)


def test_statistics_are_those_of_the_sampler(records):
    for record in records:
        steps = np.arange(1, len(record.rewards) + 1, dtype=np.float32)
        np.testing.assert_array_equal(record.logp, -steps, strict=True)
        np.testing.assert_array_equal(record.lse, -2 * steps, strict=True)
        np.testing.assert_array_equal(record.behaviour_logp, -3 * steps, strict=True)


def test_answers_to_one_prompt_are_a_group(records):
    # Named by the row, or numbered in the whole list, of which these rows are the part from 7 on.
    assert [record.group for record in records] == ["first"] * 3 + ["#8"] * 3 + ["#9"] * 3


def test_ids_and_numbers_never_name_the_same_group(scripted, tokenizer):
    rows = [{"prompt": "a", "id": name} for name in ("3", "#3", "##3", 0, None)] + [{"prompt": "a"}]
    out = gathered(scripted([["x"]] * 6), None, tokenizer, rows, lambda row, text: 0, key=0, stop_tokens=(), first=-2)
    assert [record.group for record in out] == ["3", "##3", "###3", "0", "#2", "#3"]


def test_the_row_comes_back_from_the_record(records):
    assert [json.loads(record.prompt) for record in records] == np.repeat(ROWS, 3).tolist()
    assert "zwölf ☃" in records[0].prompt


def test_what_json_does_not_know_is_stored_as_text(scripted, tokenizer):
    row = {"prompt": "a", "when": datetime.date(2024, 2, 29), "numbers": [np.int64(7), 8]}
    (record,) = gathered(scripted([["b"]]), None, tokenizer, [row], lambda row, text: 1, key=0, stop_tokens=())
    assert json.loads(record.prompt) == {"prompt": "a", "when": "2024-02-29", "numbers": ["7", 8]}


@pytest.mark.parametrize(
    "tokens", [[5, 6, 7], np.array([5, 6, 7]), (np.int32(5), 6, 7)], ids=["list", "array", "tuple"]
)
def test_tokens_of_a_row_are_the_prompt_as_they_are(tokens, scripted, tokenizer):
    row = {"prompt": "sort 21:", "tokens": tokens, "answer": "12"}
    sampler, seen = scripted([["12"], ["a"]]), []
    rows = [row, {"tokens": tokens}]
    out = gathered(sampler, None, tokenizer, rows, lambda row, text: seen.append(row) or 0, key=0, stop_tokens=())
    assert sampler.asked[1] == [[5, 6, 7]] * 2
    assert [record.tokens[~record.action_mask].tolist() for record in out] == [[5, 6, 7]] * 2
    # The stored row can be scored again, but does not repeat what the record holds.
    assert [json.loads(record.prompt) for record in out] == [{"prompt": "sort 21:", "answer": "12"}, {}]
    assert seen[1] is row


def test_tools_of_a_row_are_in_its_prompt(scripted, tokenizer):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for tool in tools or [] %}{{ tool.name }};{% endfor %}{{ messages[0].content }}>"
    messages = [{"role": "user", "content": "hi"}]
    rows = [{"prompt": messages}, {"prompt": messages, "tools": [{"name": "add"}, {"name": "sort"}]}]
    sampler = scripted([["a"], ["b"]])
    gathered(sampler, None, tokenizer, rows, lambda row, text: 0, key=0, stop_tokens=())
    assert [tokenizer.decode(prompt) for prompt in sampler.asked[1]] == ["hi>", "add;sort;hi>"]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"id": "q", "answer": "1"}, "the row 'q' has neither 'prompt' nor 'tokens'"),
        ({"id": "q", "tokens": [1, 2.5]}, "the row 'q' has 'tokens' that are no integers"),
        ({"prompt": "a", "tokens": 7}, "the row with the prompt \"a\" has 'tokens' that are no integers"),
    ],
)
def test_rows_without_a_usable_prompt_are_refused(row, said, scripted, tokenizer):
    with pytest.raises(UserError, match=said):
        gathered(scripted([["a"]]), None, tokenizer, [row], lambda row, text: 0, key=0, stop_tokens=())


def test_the_reward_sees_row_and_text(scripted, tokenizer):
    seen = []

    def reward(row, text):
        seen.append((row, text))
        return np.float32(0.5)

    sampler = scripted([["a<eos>", "b"], ["<eos>", "c d"]])
    out = gathered(sampler, None, tokenizer, ROWS[:2], reward, key=0, stop_tokens=(2,))
    assert seen == [(ROWS[1], ""), (ROWS[1], "c d"), (ROWS[0], "a"), (ROWS[0], "b")]
    assert all(given is row for (given, _), row in zip(seen, [ROWS[1]] * 2 + [ROWS[0]] * 2, strict=True))
    assert [record.rewards.sum() for record in out] == [0.5] * 4


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("ab<eos>", (2,), "ab"),
        ("ab", (2,), "ab"),
        ("<eos>", (2,), ""),
        ("", (2,), ""),
        # A stop that is a plain letter ends the text without being part of it, but only at the end.
        ("abab", "b", "aba"),
        ("abab", "a", "abab"),
        ("a<|im_end|>b<eos>", (2,), "ab"),
        ("ü☃<eos>", (2, 4), "ü☃"),
    ],
)
def test_text_has_no_stop_token(text, stops, expected, tokenizer):
    if isinstance(stops, str):
        stops = tokenizer(stops, add_special_tokens=False).input_ids
    assert decode(tokenizer, np.array(tokenizer(text, add_special_tokens=False).input_ids, int), stops) == expected


def test_a_real_sampler_can_be_asked_in_parts(tokenizer, draw_params):
    model = Model.from_config(DecoderConfig(264, 16, 24, 2, 4, 2, max_positions=96, initializer_range=0.2))
    params = draw_params(model, 0)
    stops = tuple(range(100))
    sampler = Sampler(model, Sampling(max_tokens=8), stops, samples_per_prompt=2, prompts_in_flight=2)
    settings = dict(key=KEY, stop_tokens=stops)

    def reward(row, text):
        return len(text) / 8

    whole = gathered(sampler, params, tokenizer, ROWS, reward, **settings)
    alone = gathered(sampler, params, tokenizer, ROWS[:1], reward, **settings)
    for ours, theirs in zip(alone, whole[:2], strict=True):
        assert (ours.tokens.tolist(), ours.prompt) == (theirs.tokens.tolist(), theirs.prompt)
        np.testing.assert_allclose(ours.logp, theirs.logp, atol=1e-5)
    rest = gathered(sampler, params, tokenizer, ROWS[1:], reward, first=1, **settings)
    assert [record.tokens.tolist() for record in rest] == [record.tokens.tolist() for record in whole[2:]]
    assert [record.group for record in whole] == [record.group for record in whole[:2]] + [r.group for r in rest]
    assert len({record.tokens.tobytes() for record in whole}) == 6
    for record in whole:
        validate(record, vocab_size=264)
        actions = record.tokens[record.action_mask]
        np.testing.assert_array_equal(record.logp, record.behaviour_logp)
        assert (actions[:-1] >= 100).all() and (actions[-1] < 100 or len(actions) == 8)
        assert record.rewards[-1] == pytest.approx(len(decode(tokenizer, actions, stops)) / 8)
