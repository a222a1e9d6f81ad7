"""Conversations in the spellings of other trainers and APIs are read as plain messages, or rejected by field."""

import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shiq_jax.data import files
from shiq_jax.data.chat import encode_completion, encode_text
from shiq_jax.data.formats import demonstrations, preferences, unpaired_preferences
from shiq_jax.data.messages import normalize_row
from shiq_jax.errors import UserError
from shiq_jax.replay.export import normalize_id
from shiq_jax.tasks.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
CALL = {"type": "function", "function": {"name": "f", "arguments": {"city": "Paris"}}}


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **fields):
    return {"role": "assistant", "content": content, **fields}


def texts(reader, row, tmp_path):
    """(context, actions) of every record of a row, as text."""
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row) + "\n")
    return [
        tuple(TOKENIZER.decode(record.tokens[mask].tolist()) for mask in (~record.action_mask, record.action_mask))
        for record in reader(file, TOKENIZER)
    ]


PAIR = {"prompt": [user("hi")], "chosen": [assistant("yo")], "rejected": [assistant("no")]}


@pytest.mark.parametrize(
    "row",
    [
        {**PAIR, "chosen": assistant("yo"), "rejected": assistant("no")},
        {"messages": [user("hi")], "chosen": assistant("yo"), "rejected": assistant("no")},
        {
            "conversations": [{"from": "human", "value": "hi"}],
            "chosen": {"from": "gpt", "value": "yo"},
            "rejected": {"from": "gpt", "value": "no"},
        },
        {
            "input": {"messages": [user("hi")]},
            "preferred_output": [assistant("yo")],
            "non_preferred_output": [assistant("no")],
        },
        {**PAIR, "prompt": [user([{"type": "text", "text": "h"}, "i"])], "chosen": [assistant("yo", tool_calls=None)]},
        {**PAIR, "chosen": [{"role": "model", "content": "yo"}]},
    ],
)
def test_preferences_in_other_formats_give_the_same_records(row, tmp_path):
    assert texts(preferences, row, tmp_path) == texts(preferences, PAIR, tmp_path)


def test_kto_tag_labels_the_last_answer(tmp_path):
    row = {"messages": [user("hi"), assistant("yo"), user("and?"), assistant("no")], "kto_tag": True}
    expected = {"prompt": row["messages"][:3], "completion": [assistant("no")], "label": True}
    assert texts(unpaired_preferences, row, tmp_path) == texts(unpaired_preferences, expected, tmp_path)


def test_label_of_a_conversation_leaves_all_its_turns(tmp_path):
    """Only `kto_tag` is about the last answer; a label may be a topic."""
    row = {"messages": [user("hi"), assistant("yo"), user("and?"), assistant("no")], "label": "greeting"}
    expected = {"messages": row["messages"]}
    assert texts(demonstrations, row, tmp_path) == texts(demonstrations, expected, tmp_path)


def test_shared_gpt_conversations_are_demonstrations(tmp_path):
    row = {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]}
    expected = {"messages": [user("hi"), assistant("yo")]}
    assert texts(demonstrations, row, tmp_path) == texts(demonstrations, expected, tmp_path)


def test_context_fields_belong_to_the_prompt():
    row = {"system": "Be brief.", "history": [["a", "b"]], "instruction": "Translate.", "input": "Hi", "output": "x"}
    assert normalize_row(row) == {
        "prompt": [
            {"role": "system", "content": "Be brief."}, user("a"), assistant("b"), user("Translate.\nHi"),
        ],
        "output": "x",
    }  # fmt: skip
    row = {"system": "Be brief.", "messages": [user("a"), assistant("b")]}
    assert normalize_row(row)["messages"] == [{"role": "system", "content": "Be brief."}, user("a"), assistant("b")]
    # A reward may read `input`.
    assert normalize_row({"prompt": "a", "input": "b"}) == {"prompt": "a", "input": "b"}


def template(text):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = text
    return tokenizer


@pytest.mark.parametrize("arguments", [{"city": "Paris"}, '{"city": "Paris"}'])
@pytest.mark.parametrize("expression", ["{{ %s | tojson }}", "{{ %s }}"])
def test_arguments_are_printed_as_json_once(arguments, expression):
    """For templates that print an object as JSON, and for those that print the text that they get."""
    field = "m['tool_calls'][0]['function']['arguments']"
    tokenizer = template(
        "{% for m in messages %}<|im_start|>{% if 'tool_calls' in m %}" + expression % field
        + "{% else %}{{ m['content'] }}{% endif %}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>{% endif %}"
    )  # fmt: skip
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    encoded = encode_completion(tokenizer, [user("hi")], [assistant("", tool_calls=[call])])
    assert tokenizer.decode(encoded.tokens[encoded.action_mask].tolist()) == '{"city": "Paris"}<|im_end|>'


def test_prompt_that_ends_in_an_answer_is_continued():
    encoded = encode_completion(TOKENIZER, [user("hi"), assistant("It is")], " Paris")
    opened = encode_completion(TOKENIZER, [user("hi")], "It is Paris")
    assert encoded.tokens.tolist() == opened.tokens.tolist()
    assert TOKENIZER.decode(encoded.tokens[encoded.action_mask].tolist()).startswith(" Paris")


def test_pairs_without_spaces_share_a_prompt(tmp_path):
    row = {"chosen": "问题：首都？回答：巴黎", "rejected": "问题：首都？回答：伦敦"}
    expected = {"prompt": "问题：首都？回答：", "chosen": "巴黎", "rejected": "伦敦"}
    assert texts(preferences, row, tmp_path) == texts(preferences, expected, tmp_path)


def test_text_that_ends_with_a_closed_turn_gets_no_eos():
    closed, open_text = encode_text(TOKENIZER, "a<|im_end|>\n"), encode_text(TOKENIZER, "a")
    assert TOKENIZER.decode(closed.tokens.tolist()).endswith("<|im_end|>\n")
    assert TOKENIZER.decode(open_text.tokens.tolist()).endswith(TOKENIZER.eos_token)


def test_null_fields_of_arrow_are_dropped_and_tools_are_parsed():
    row = normalize_row({
        "messages": [
            {"role": "user", "content": "hi", "tool_calls": None},
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
        ],
        "tools": json.dumps([CALL]),
    })  # fmt: skip
    assert row["messages"] == [user("hi"), assistant("", tool_calls=[CALL])] and row["tools"] == [CALL]


def test_parquet_keeps_tool_calls_and_json_columns(tmp_path):
    """Arrow fills every object with the fields of all others; a tool call must not gain arguments from that."""
    other = {"type": "function", "function": {"name": "g", "arguments": {"a": 2, "b": None}}}
    rows = [{"prompt": [user("hi")], "completion": [assistant(None, tool_calls=[call])]} for call in (CALL, other)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "arrow.parquet")
    calls = [row["completion"][0]["tool_calls"] for row in files.rows(tmp_path / "arrow.parquet")]
    assert calls == [[CALL], [{"type": "function", "function": {"name": "g", "arguments": {"a": 2}}}]]
    if hasattr(datasets, "Json"):
        datasets.Dataset.from_list(rows, on_mixed_types="use_json").to_parquet(tmp_path / "json.parquet")
        calls = [row["completion"][0]["tool_calls"] for row in files.rows(tmp_path / "json.parquet")]
        assert calls == [[CALL], [other]]


@pytest.mark.parametrize(
    ("reader", "row", "fragments"),
    [
        (demonstrations, {"messages": [user("hi"), assistant(None)]}, ["'messages', message 2", "without content"]),
        (preferences, {**PAIR, "chosen": [assistant("")]}, ["'chosen', message 1", "without content"]),
        (
            demonstrations,
            {"messages": [user([{"type": "image_url", "image_url": "x"}]), assistant("yo")]},
            ["'messages', message 1", "'image_url'"],
        ),
        (demonstrations, {**PAIR, "completion": "yo", "tools": "[{"}, ["'tools'", "JSON"]),
        (unpaired_preferences, {"prompt": "a", "completion": "b", "label": 1, "kto_tag": 1}, ["'kto_tag'", "'label'"]),
        (preferences, {**PAIR, "rejected": [user("no")]}, ["'rejected'", "'user'"]),
        (demonstrations, {"prompt": "a", "completion": "b", "images": ["x.png"]}, ["'images'", "text"]),
        (demonstrations, {"system": "a", "messages": []}, ["'system'", "prompt"]),
        (demonstrations, {"system": "a", "text": "b"}, ["'system'", "prompt"]),
        (demonstrations, {"prompt": "a", "completion": "b", "history": ["c"]}, ["'history'", "pairs"]),
        (demonstrations, {"prompt": "a", "completion": "b", "user_id": 1.5}, ["'user_id'", "1.5"]),
    ],
)
def test_unusable_content_is_rejected_by_field(reader, row, fragments, tmp_path):
    with pytest.raises(UserError) as error:
        texts(reader, row, tmp_path)
    assert all(fragment in str(error.value) for fragment in ["line 1", *fragments])


def test_equal_ids_of_different_types_are_one_id(tmp_path):
    assert {normalize_id("user_id", value) for value in (7, 7.0, "7")} == {"7"}
    for value in (True, 7.5, float("nan"), float("inf"), [7]):
        with pytest.raises(UserError, match="user_id"):
            normalize_id("user_id", value)


def test_text_with_bos_gets_no_second_one(tmp_path):
    bos = TOKENIZER.bos_token
    with_bos, without = (
        texts(demonstrations, {"prompt": f"{start}hi", "completion": "yo"}, tmp_path) for start in (bos, "")
    )
    assert with_bos == without and with_bos[0][0].count(bos) == 1
