"""Records built from sampled completions: tokens, rewards, statistics and groups."""

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
from shiq_jax.rollout.collect import collect_records, decode, records_in_order
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
def fake_sampler(tokenizer):
    """`fake_sampler(texts)`: a sampler that returns `texts[i]` for prompt i and stores its arguments in `args`."""

    def make(texts):
        def stream(params, prompts, key, first):
            sampler.args = (params, prompts, key, first)
            # The last prompt finishes first.
            for index in reversed(range(len(prompts))):
                yield index, [answer(text) for text in texts[index]]

        def answer(text):
            tokens = np.array(tokenizer(text, add_special_tokens=False).input_ids)
            logp = -np.arange(1.0, len(tokens) + 1)
            return {"tokens": tokens, "logp": logp, "lse": logp * 2, "behaviour_logp": logp * 3}

        sampler = types.SimpleNamespace(stream=stream)
        return sampler

    return make


def collect_in_order(*args, **kwargs):
    return records_in_order(collect_records(*args, **kwargs))


@pytest.fixture(scope="module")
def records(fake_sampler, tokenizer):
    texts = [["13<eos>", "1", "31<|im_end|>"], ["yes<eos>", "no", "<eos>"], ["12", "ü", "3 <eos>"]]
    sampler = fake_sampler(texts)

    def reward(row, text):
        return len(text) + 10 * (text == row["answer"])

    records = collect_in_order(sampler, "weights", tokenizer, ROWS, reward, key="key", stop_tokens=(2, 4), first=7)
    assert sampler.args == ("weights", [encode_prompt(tokenizer, row["prompt"]) for row in ROWS], "key", 7)
    return records


def test_records_are_in_the_order_of_the_rows(records, tokenizer):
    texts = [tokenizer.decode(record.tokens[record.action_mask].tolist()) for record in records]
    assert texts == ["13<eos>", "1", "31<|im_end|>", "yes<eos>", "no", "<eos>", "12", "ü", "3 <eos>"]


def test_record_is_prompt_then_actions(records, tokenizer):
    for record, row in zip(records, np.repeat(ROWS, 3), strict=True):
        prompt = encode_prompt(tokenizer, row["prompt"])
        assert record.tokens[: len(prompt)].tolist() == prompt
        assert record.action_mask.tolist() == [False] * len(prompt) + [True] * (len(record.tokens) - len(prompt))
        validate(record, vocab_size=264)


def test_reward_is_on_the_last_action(records):
    # Length of the text without the stop token, plus 10 for the correct answer.
    assert [record.rewards[-1] for record in records] == [12, 1, 2, 13, 2, 0, 2, 1, 2]
    assert all(not record.rewards[:-1].any() and len(record.rewards) == record.action_mask.sum() for record in records)


def test_statistics_come_from_the_sampler(records):
    for record in records:
        steps = np.arange(1, len(record.rewards) + 1, dtype=np.float32)
        np.testing.assert_array_equal(record.logp, -steps, strict=True)
        np.testing.assert_array_equal(record.lse, -2 * steps, strict=True)
        np.testing.assert_array_equal(record.behaviour_logp, -3 * steps, strict=True)


def test_answers_to_one_prompt_form_a_group(records):
    # The group is the row's id, or its number; `first` is 7.
    assert [record.group for record in records] == ["first"] * 3 + ["#8"] * 3 + ["#9"] * 3


def test_ids_never_collide_with_row_numbers(fake_sampler, tokenizer):
    rows = [{"prompt": "a", "id": name} for name in ("3", "#3", "##3", 0, None)] + [{"prompt": "a"}]
    records = collect_in_order(
        fake_sampler([["x"]] * 6), None, tokenizer, rows, lambda row, text: 0, key=0, stop_tokens=(), first=-2
    )
    assert [record.group for record in records] == ["3", "##3", "###3", "0", "#2", "#3"]


def test_record_stores_the_row_as_json(records):
    assert [json.loads(record.prompt) for record in records] == np.repeat(ROWS, 3).tolist()
    assert "zwölf ☃" in records[0].prompt


def test_values_that_json_cannot_represent_are_stored_as_text(fake_sampler, tokenizer):
    row = {"prompt": "a", "date": datetime.date(2024, 2, 29), "numbers": [np.int64(7), 8]}
    (record,) = collect_in_order(
        fake_sampler([["b"]]), None, tokenizer, [row], lambda row, text: 1, key=0, stop_tokens=()
    )
    assert json.loads(record.prompt) == {"prompt": "a", "date": "2024-02-29", "numbers": ["7", 8]}


@pytest.mark.parametrize(
    "tokens", [[5, 6, 7], np.array([5, 6, 7]), (np.int32(5), 6, 7)], ids=["list", "array", "tuple"]
)
def test_tokens_of_a_row_replace_its_prompt(tokens, fake_sampler, tokenizer):
    row = {"prompt": "sort 21:", "tokens": tokens, "answer": "12"}
    sampler, rewarded_rows = fake_sampler([["12"], ["a"]]), []
    rows = [row, {"tokens": tokens}]

    def reward(row, text):
        rewarded_rows.append(row)
        return 0

    records = collect_in_order(sampler, None, tokenizer, rows, reward, key=0, stop_tokens=())
    assert sampler.args[1] == [[5, 6, 7]] * 2
    assert [record.tokens[~record.action_mask].tolist() for record in records] == [[5, 6, 7]] * 2
    # The stored row can be scored again; its tokens are in the record.
    assert [json.loads(record.prompt) for record in records] == [{"prompt": "sort 21:", "answer": "12"}, {}]
    assert rewarded_rows[1] is row


def test_tools_are_passed_to_the_chat_template(fake_sampler, tokenizer):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for tool in tools or [] %}{{ tool.name }};{% endfor %}{{ messages[0].content }}>"
    messages = [{"role": "user", "content": "hi"}]
    rows = [{"prompt": messages}, {"prompt": messages, "tools": [{"name": "add"}, {"name": "sort"}]}]
    sampler = fake_sampler([["a"], ["b"]])
    collect_in_order(sampler, None, tokenizer, rows, lambda row, text: 0, key=0, stop_tokens=())
    assert [tokenizer.decode(prompt) for prompt in sampler.args[1]] == ["hi>", "add;sort;hi>"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"id": "q", "answer": "1"}, "the row 'q' has neither 'prompt' nor 'tokens'"),
        ({"id": "q", "tokens": [1, 2.5]}, "the row 'q' has 'tokens' that are not integers"),
        ({"prompt": "a", "tokens": 7}, "the row with the prompt \"a\" has 'tokens' that are not integers"),
    ],
)
def test_rows_without_a_valid_prompt_are_rejected(row, message, fake_sampler, tokenizer):
    with pytest.raises(UserError, match=message):
        collect_in_order(fake_sampler([["a"]]), None, tokenizer, [row], lambda row, text: 0, key=0, stop_tokens=())


def test_reward_gets_row_and_text(fake_sampler, tokenizer):
    calls = []

    def reward(row, text):
        calls.append((row, text))
        return np.float32(0.5)

    sampler = fake_sampler([["a<eos>", "b"], ["<eos>", "c d"]])
    records = collect_in_order(sampler, None, tokenizer, ROWS[:2], reward, key=0, stop_tokens=(2,))
    assert calls == [(ROWS[1], ""), (ROWS[1], "c d"), (ROWS[0], "a"), (ROWS[0], "b")]
    assert all(arg is row for (arg, _), row in zip(calls, [ROWS[1]] * 2 + [ROWS[0]] * 2, strict=True))
    assert [record.rewards.sum() for record in records] == [0.5] * 4


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("ab<eos>", (2,), "ab"),
        ("ab", (2,), "ab"),
        ("<eos>", (2,), ""),
        ("", (2,), ""),
        # Only a stop token at the end is removed, even if it is an ordinary letter.
        ("abab", "b", "aba"),
        ("abab", "a", "abab"),
        ("a<|im_end|>b<eos>", (2,), "ab"),
        ("ü☃<eos>", (2, 4), "ü☃"),
    ],
)
def test_decode_removes_the_stop_token(text, stops, expected, tokenizer):
    if isinstance(stops, str):
        stops = tokenizer(stops, add_special_tokens=False).input_ids
    assert decode(tokenizer, np.array(tokenizer(text, add_special_tokens=False).input_ids, int), stops) == expected


def test_rows_can_be_sampled_in_parts(tokenizer, random_params):
    model = Model.from_config(DecoderConfig(264, 16, 24, 2, 4, 2, max_positions=96, initializer_range=0.2))
    params = random_params(model, 0)
    stops = tuple(range(100))
    sampler = Sampler(model, Sampling(max_tokens=8), stops, samples_per_prompt=2, prompts_in_flight=2)
    kwargs = dict(key=KEY, stop_tokens=stops)

    def reward(row, text):
        return len(text) / 8

    all_records = collect_in_order(sampler, params, tokenizer, ROWS, reward, **kwargs)
    first_part = collect_in_order(sampler, params, tokenizer, ROWS[:1], reward, **kwargs)
    for record, expected in zip(first_part, all_records[:2], strict=True):
        assert (record.tokens.tolist(), record.prompt) == (expected.tokens.tolist(), expected.prompt)
        np.testing.assert_allclose(record.logp, expected.logp, atol=1e-5)
    rest = collect_in_order(sampler, params, tokenizer, ROWS[1:], reward, first=1, **kwargs)
    assert [record.tokens.tolist() for record in rest] == [record.tokens.tolist() for record in all_records[2:]]
    assert [record.group for record in all_records] == [record.group for record in all_records[:2]] + [
        r.group for r in rest
    ]
    assert len({record.tokens.tobytes() for record in all_records}) == 6
    for record in all_records:
        validate(record, vocab_size=264)
        actions = record.tokens[record.action_mask]
        np.testing.assert_array_equal(record.logp, record.behaviour_logp)
        assert (actions[:-1] >= 100).all() and (actions[-1] < 100 or len(actions) == 8)
        assert record.rewards[-1] == pytest.approx(len(decode(tokenizer, actions, stops)) / 8)
