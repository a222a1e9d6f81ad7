"""The sorting task: disjoint splits, reproducible rows and the reward."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shiq_jax.tasks.sorting import is_held_out, sorting_reward, sorting_rows

DIGITS = st.text("0123456789", min_size=1, max_size=9)


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
@settings(max_examples=20, deadline=None)
def test_splits_share_no_prompt_and_no_answer(train_seed, held_out_seed):
    train, held_out = sorting_rows(80, seed=train_seed), sorting_rows(40, split="held_out", seed=held_out_seed)
    for field in ("prompt", "answer"):
        assert not {row[field] for row in train} & {row[field] for row in held_out}


def test_rows_are_distinct_correct_and_reproducible():
    rows = sorting_rows(500, seed=7, min_length=3, max_length=6)
    assert len({row["prompt"] for row in rows}) == 500
    for row in rows:
        digits = row["prompt"].removeprefix("sort ").removesuffix(":")
        assert sorted(digits) == list(row["answer"])
        assert 3 <= len(digits) <= 6
    assert sorting_rows(100, seed=7, min_length=3, max_length=6) == rows[:100]


def test_about_one_in_eight_is_held_out():
    answers = {"".join(sorted(f"{number:06d}")) for number in range(0, 10**6, 13)}
    assert 0.10 < sum(map(is_held_out, answers)) / len(answers) < 0.15


@given(DIGITS, DIGITS)
def test_reward_is_one_only_for_the_answer(answer, completion):
    row = {"prompt": "", "answer": answer}
    reward = sorting_reward(row, completion)
    assert 0.0 <= reward <= 1.0
    assert (reward == 1.0) == (answer == completion)
    assert sorting_reward(row, f" {completion}\n") == reward


def test_reward_examples():
    row = {"prompt": "sort 4231:", "answer": "1234"}
    assert sorting_reward(row, "1243") == 0.5
    assert sorting_reward(row, "12") == 0.5
    assert sorting_reward(row, "12344444") == 0.5
    assert sorting_reward(row, "") == 0.0


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"count": 1, "split": "test"}, "split='test'"),
        ({"count": 1, "min_length": 5, "max_length": 4}, "min_length=5"),
        ({"count": 50, "min_length": 1, "max_length": 1}, "count=50"),
    ],
)
def test_invalid_arguments_are_rejected(kwargs, message):
    with pytest.raises(ValueError, match=message):
        sorting_rows(**kwargs)
