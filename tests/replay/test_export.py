"""Conversion of records to and from JSON, JSON Lines and Hugging Face datasets."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shiq_jax.errors import UserError
from shiq_jax.replay import Buffer, from_dataset, record_from_json, record_to_json, to_dataset, to_jsonl


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), statistics=st.booleans())
def test_json_round_trip_is_exact(make_record, seed, statistics):
    record = make_record(np.random.default_rng(seed), statistics=statistics, feedback=True)
    content = json.loads(json.dumps(record_to_json(record), allow_nan=False))
    assert record_from_json(content) == record
    for name in ("action_mask", "rewards", *(["logp", "lse", "behaviour_logp"] if statistics else [])):
        assert len(content[name]) == len(content["tokens"])
    assert all(
        reward == 0 for reward, action in zip(content["rewards"], content["action_mask"], strict=True) if not action
    )


def json_record(**changes):
    return {"tokens": [5, 6, 7], "action_mask": [False, True, True], "rewards": [0, 0, 1.5], **changes}


def test_three_fields_are_sufficient():
    record = record_from_json(json_record(logp=[None, -1, -2]))
    assert record.rewards.tolist() == [0, 1.5] and record.logp.tolist() == [-1, -2] and record.lse is None
    assert record.group == record_from_json(json_record(tokens=[5, 8, 9])).group, "equal contexts form a group"
    assert record.group != record_from_json(json_record(tokens=[4, 6, 7])).group
    assert record_from_json(json_record(group_id=12)).group == "12"


def test_prompts_are_stored_as_json_objects():
    row = json.dumps({"prompt": "Hi", "answer": "Ho"})
    assert record_from_json(json_record(prompt=row)).prompt == row
    for prompt in ("Hi", "12", [{"role": "user", "content": "Hü"}]):
        assert json.loads(record_from_json(json_record(prompt=prompt)).prompt) == {"prompt": prompt}


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(tokens=None), "'tokens' is missing"),
        (dict(action_mask="no"), "'action_mask' is of type str"),
        (dict(action_mask=[False, True]), "'action_mask' has 2 entries for 3 tokens"),
        (dict(rewards=None), "'rewards' is missing"),
        (dict(rewards=1.0), "'rewards' is of type float"),
        (dict(rewards=[0, 1.0]), "'rewards' has 2 entries"),
        (dict(rewards=[1.0, 0, 0]), "'rewards' is 1.0 at token 0, which is not an action"),
        (dict(rewards=[0, None, 1]), "'rewards' is None at token 1"),
        (dict(lse=[0, 1, 2], logp=[0, "a", 2]), "'logp' is 'a' at token 1"),
        (dict(tokens=[1, "b", 2]), "tokens"),
        (dict(action_mask=[0, 3, 1]), "action_mask contains a value other"),
        (dict(action_mask=[True, True, True]), "first token"),
        (dict(rewards=[0, 0, float("nan")]), "rewards is nan"),
        (dict(chosen="the better one"), "chosen is 'the better one'; give true, false or null"),
        (dict(label=1), "label is '1'; give true, false"),
        (dict(rank=True), "rank is 'True'; give a number"),
        (dict(score="high"), "score is 'high'; give a number"),
        (dict(score=10**400), "score does not fit"),
        (dict(score=float("inf")), "score is inf; give a finite number"),
    ],
)
def test_invalid_fields_are_rejected(change, message):
    with pytest.raises(UserError) as error:
        record_from_json(json_record(**change))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_jsonl_has_one_line_per_record(make_groups, make_buffer, tmp_path):
    records = make_groups(np.random.default_rng(0), feedback=True)
    assert to_jsonl(make_buffer(records, shards=2), tmp_path / "out.jsonl") == len(records)
    lines = (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()
    assert [record_from_json(json.loads(line)) for line in lines] == records


def test_dataset_round_trip(make_groups, make_buffer, tmp_path):
    import datasets

    records = make_groups(np.random.default_rng(1), feedback=True)
    buffer = make_buffer(records, shards=2)
    opened = datasets.Dataset.from_file(str(buffer.record_files()[0]))
    assert opened["tokens"][0] == records[0].tokens.tolist() and len(opened) == len(buffer.shards[0])
    dataset = to_dataset(buffer)
    assert len(dataset) == len(records)
    copy = Buffer.create(tmp_path / "copy")
    copy.append(from_dataset(dataset))
    assert copy.read(range(len(copy))) == records
    with pytest.raises(UserError, match="has no column 'rewards'"):
        list(from_dataset(dataset.remove_columns("rewards")))
    reduced = list(from_dataset(dataset.remove_columns(["lse", "user"])))
    assert reduced[0].lse is None and reduced[0].tokens.tolist() == records[0].tokens.tolist()


def test_empty_buffer_cannot_become_a_dataset(make_buffer):
    with pytest.raises(UserError, match="is empty"):
        to_dataset(make_buffer([]))
