"""Conversations in the spellings of other trainers and APIs are read as plain messages, or rejected by field."""

import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shiq_jax.data import files
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


def test_shared_gpt_conversations_are_demonstrations(tmp_path):
    row = {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]}
    expected = {"messages": [user("hi"), assistant("yo")]}
    assert texts(demonstrations, row, tmp_path) == texts(demonstrations, expected, tmp_path)


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
