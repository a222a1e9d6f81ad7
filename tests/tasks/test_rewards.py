"""Reward functions by name, and errors for unknown or invalid rewards."""

import math
import sys

import pytest

from shiq_jax.errors import UserError
from shiq_jax.tasks import rewards
from shiq_jax.tasks.sorting import sorting_reward


def test_exact_ignores_surrounding_white_space():
    reward = rewards.resolve("exact")
    assert reward({"answer": "12"}, " 12\n") == 1.0
    assert reward({"answer": "12"}, "1 2") == 0.0
    assert reward({"answer": 12}, "12") == 1.0


def test_sorting_resolves_to_the_task_reward():
    row = {"prompt": "sort 31:", "answer": "13"}
    assert [rewards.resolve("sorting")(row, text) for text in ("13", "11", "")] == [
        sorting_reward(row, text) for text in ("13", "11", "")
    ]


def test_reward_from_a_module_in_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "lengths_reward.py").write_text(
        "def score(row, completion):\n    return len(completion) * row['weight']\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(sys.path))
    reward = rewards.resolve("lengths_reward:score")
    assert reward({"weight": 2}, "abc") == 6.0 and isinstance(reward({"weight": 2}, "abc"), float)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("exakt", "the reward 'exakt' is unknown"),
        ("math:", "is unknown"),
        ("no_such_module_here:score", "cannot be imported"),
        ("math:no_such_function", "no function 'no_such_function'"),
        ("math:pi", "no function 'pi'"),
    ],
)
def test_unknown_rewards_are_rejected(name, message):
    with pytest.raises(UserError, match=message):
        rewards.resolve(name)


@pytest.mark.parametrize("value", [math.nan, math.inf, None, "high", 10**400])
def test_non_finite_reward_names_the_row(value, monkeypatch):
    monkeypatch.setattr(math, "test_reward", lambda row, completion: value, raising=False)
    reward = rewards.resolve("math:test_reward")
    with pytest.raises(UserError, match="the row 'q7'.*finite number"):
        reward({"id": "q7", "prompt": "a"}, "b")
    with pytest.raises(UserError, match='the prompt "a"'):
        reward({"prompt": "a"}, "b")
    with pytest.raises(UserError, match='the prompt "a"'):
        reward({"id": None, "prompt": "a"}, "b")


@pytest.mark.parametrize("error", [KeyError("weight"), ZeroDivisionError("by zero"), RuntimeError("no\nway")])
def test_failing_reward_names_the_row_and_the_error(error, monkeypatch):
    def fail(row, completion):
        raise error

    monkeypatch.setattr(math, "test_reward", fail, raising=False)
    with pytest.raises(UserError, match="(?s)'math:test_reward' failed with .* the row 'q7' .* 'hello'") as caught:
        rewards.resolve("math:test_reward")({"id": "q7"}, "hello")
    assert f"{type(error).__name__}: {error}" in str(caught.value)
    assert caught.value.__cause__ is error


def test_user_errors_of_a_reward_are_unchanged(monkeypatch):
    def fail(row, completion):
        raise UserError("the judge is not available: try again")

    monkeypatch.setattr(math, "test_reward", fail, raising=False)
    with pytest.raises(UserError, match="^the judge is not available: try again$"):
        rewards.resolve("math:test_reward")({}, "b")


def test_missing_fields_are_named():
    with pytest.raises(UserError, match="'answer'"):
        rewards.resolve("exact")({"prompt": "a"}, "b")
    with pytest.raises(
        UserError, match="'sorting' failed with KeyError: 'answer' for the row with the prompt \"sort 21:\""
    ):
        rewards.resolve("sorting")({"prompt": "sort 21:"}, "12")
    with pytest.raises(UserError, match="'functions'"):
        rewards.REWARDS["bfcl"]({"id": 1, "prompt": "a"}, "b")
