"""Rewards by name: what each name stands for, and what is refused at the door."""

import math

import pytest

from shiq_jax.data.sorting import sorting_reward
from shiq_jax.errors import Refusal
from shiq_jax.rollout import rewards


def test_exact_compares_without_white_space_around():
    reward = rewards.resolve("exact")
    assert reward({"answer": "12"}, " 12\n") == 1.0
    assert reward({"answer": "12"}, "1 2") == 0.0
    assert reward({"answer": 12}, "12") == 1.0


def test_sorting_is_the_embedded_tasks_reward():
    row = {"prompt": "sort 31:", "answer": "13"}
    assert [rewards.resolve("sorting")(row, text) for text in ("13", "11", "")] == [
        sorting_reward(row, text) for text in ("13", "11", "")
    ]


def test_a_function_of_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "lengths_reward.py").write_text(
        "def score(row, completion):\n    return len(completion) * row['weight']\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(rewards.sys.path))
    reward = rewards.resolve("lengths_reward:score")
    assert reward({"weight": 2}, "abc") == 6.0 and isinstance(reward({"weight": 2}, "abc"), float)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("exakt", "the reward 'exakt' is unknown"),
        ("math:", "is unknown"),
        ("no_such_module_here:score", "cannot be imported"),
        ("math:no_such_function", "no function 'no_such_function'"),
        ("math:pi", "no function 'pi'"),
    ],
)
def test_unknown_rewards_are_refused(name, said):
    with pytest.raises(Refusal, match=said):
        rewards.resolve(name)


@pytest.mark.parametrize("value", [math.nan, math.inf, None, "high"])
def test_rewards_that_are_no_finite_number_name_the_row(value, monkeypatch):
    monkeypatch.setattr(math, "given_reward", lambda row, completion: value, raising=False)
    reward = rewards.resolve("math:given_reward")
    with pytest.raises(Refusal, match="the row 'q7'.*finite number"):
        reward({"id": "q7", "prompt": "a"}, "b")
    with pytest.raises(Refusal, match='the prompt "a"'):
        reward({"prompt": "a"}, "b")


def test_rows_that_lack_what_a_reward_reads_are_named():
    with pytest.raises(Refusal, match="'answer'"):
        rewards.resolve("exact")({"prompt": "a"}, "b")
    with pytest.raises(Refusal, match="'functions'"):
        rewards._NAMED["bfcl"]({"id": 1, "prompt": "a"}, "b")
