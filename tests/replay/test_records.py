"""Records: dtypes, bitwise equality and validation."""

import dataclasses

import numpy as np
import pytest

from shiq_jax.errors import UserError
from shiq_jax.replay import Record, validate


def record(**changes):
    fields = dict(tokens=[1, 2, 3, 4], action_mask=[0, 0, 1, 1], rewards=[0.0, 1.0], group="g")
    return Record(**{**fields, **changes})


def test_lists_are_converted_to_the_stored_dtypes():
    result = record(behaviour_logp=[-1, -2], logp=[-1.5, -2.5], lse=np.array([3.0, 4.0]))
    assert (result.tokens.dtype, result.action_mask.dtype) == (np.int32, np.bool_)
    assert {getattr(result, name).dtype for name in ("rewards", "behaviour_logp", "logp", "lse")} == {
        np.dtype(np.float32)
    }
    validate(result, vocab_size=5)


def test_equality_is_bitwise():
    assert record() == record()
    assert record(rewards=[0.0, 1.0]) != record(rewards=[-0.0, 1.0])
    for change in (
        dict(tokens=[1, 2, 3, 5]),
        dict(group="h"),
        dict(logp=[-1.0, -1.0]),
        dict(user="u"),
        dict(prompt="{}"),
    ):
        assert record() != record(**change)
    assert record() != "record"


@pytest.mark.parametrize(
    "change, phrases",
    [
        (dict(action_mask=[0, 1, 1]), ["action_mask has 3 entries for 4 tokens"]),
        (dict(action_mask=[0, 0, 0, 0], rewards=[]), ["none of its 4 tokens is an action"]),
        (dict(tokens=[], action_mask=[], rewards=[]), ["none of its 0 tokens"]),
        (dict(action_mask=[1, 0, 0, 1]), ["first token is marked as an action", "BOS"]),
        (dict(tokens=[1, 2, -3, 4]), ["-3 is negative"]),
        (dict(tokens=[1, 2, 30, 4]), ["30", "vocabulary of 10", "tokenizer"]),
        (dict(rewards=[1.0]), ["rewards has 1 entries for 2 actions"]),
        (dict(rewards=[0.0, float("nan")]), ["rewards is nan at action 1"]),
        (dict(rewards=[1e39, 0.0]), ["rewards is inf at action 0"]),
        (dict(logp=[-1.0, -np.inf], lse=[0.0, 0.0]), ["logp is -inf at action 1"]),
        (dict(logp=[2.0, 1.0]), ["logp contains 2", "flip the sign"]),
        (dict(behaviour_logp=[-1.0]), ["behaviour_logp has 1 entries"]),
        (dict(lse=[1.0, 1.0]), ["has lse but no logp"]),
        (dict(group=""), ["group is ''"]),
        (dict(prompt={"a": 1}), ["prompt is of type dict"]),
        (dict(user="\ud800"), ["user has a lone surrogate at character 0"]),
    ],
)
def test_validate_rejects_invalid_records(change, phrases):
    with pytest.raises(UserError) as error:
        validate(record(**change), vocab_size=10, name="record 7")
    message = str(error.value)
    assert message.startswith("record 7") and "\n" not in message
    for phrase in phrases:
        assert phrase in message


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(tokens=[1.5, 2, 3, 4]), "dtype float64"),
        (dict(tokens=[1, 2, 3, 2**40]), "32 bits"),
        (dict(tokens=[[1, 2], [3, 4]]), "shape"),
        (dict(tokens=[[1], [3, 4]]), "flat list"),
        (dict(action_mask=[0, 0, 2, 1]), "action_mask"),
        (dict(rewards=["a", "b"]), "rewards has dtype"),
    ],
)
def test_lossy_conversions_are_rejected(change, message):
    with pytest.raises(ValueError, match=message):
        record(**change)


def test_equality_compares_every_field():
    optional = {"prompt": "{}", "user": "u", "chosen": True, "label": False, "rank": 2.0, "score": 0.5}
    full = record(behaviour_logp=[-1, -1], logp=[-2, -2], lse=[3, 3], **optional)
    for field in dataclasses.fields(Record):
        value = getattr(full, field.name)
        if isinstance(value, str):
            changed = value + "x"
        else:
            changed = np.logical_not(value) if np.asarray(value).dtype == bool else value + 1
        assert dataclasses.replace(full, **{field.name: changed}) != full
