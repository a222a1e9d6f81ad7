"""Preferences: every spelling of one pair gives the same prompt and answers."""

import pytest

from shiq_jax.data.pairs import split_pair
from shiq_jax.errors import UserError

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "Why is the sky blue?"}
GOOD = {"role": "assistant", "content": "Scattering."}
BAD = {"role": "assistant", "content": "Paint."}
MORE = {"role": "user", "content": "Go on."}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": [USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": USER["content"], "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": USER["content"], "chosen": [GOOD], "rejected": [BAD]},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
    ],
)
def test_all_spellings_of_a_pair_agree(row):
    assert split_pair(row) == ([USER], [GOOD], [BAD])


def test_a_system_message_before_a_text_prompt_belongs_to_the_prompt():
    row = {"prompt": USER["content"], "chosen": [SYSTEM, USER, GOOD], "rejected": [SYSTEM, USER, BAD]}
    assert split_pair(row) == ([SYSTEM, USER], [GOOD], [BAD])


def test_shared_turns_of_both_conversations_are_the_prompt():
    row = {"chosen": [USER, GOOD, MORE, GOOD], "rejected": [USER, GOOD, MORE, BAD]}
    assert split_pair(row) == ([USER, GOOD, MORE], [GOOD], [BAD])


def test_conversations_that_part_at_the_user_part_at_the_answer_before():
    other = {"role": "user", "content": "Stop."}
    row = {"chosen": [USER, GOOD, MORE, GOOD], "rejected": [USER, GOOD, other, BAD]}
    assert split_pair(row) == ([USER], [GOOD, MORE, GOOD], [GOOD, other, BAD])


def test_equal_conversations_keep_an_answer():
    assert split_pair({"chosen": [USER, GOOD], "rejected": [USER, GOOD]}) == ([USER], [GOOD], [GOOD])


def test_texts_with_and_without_a_prompt():
    assert split_pair({"prompt": "Q:", "chosen": " yes", "rejected": " no"}) == ("Q:", " yes", " no")
    assert split_pair({"chosen": "Q: nor", "rejected": "Q: no"}) == ("Q:", " nor", " no")
    assert split_pair({"chosen": "Q\nyes", "rejected": "Q\nno"}) == ("Q\n", "yes", "no")
    assert split_pair({"prompt": [USER], "chosen": "yes", "rejected": "no"}) == ([USER], "yes", "no")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "a", "rejected": "b"}, "'chosen' is missing"),
        ({"prompt": "a", "chosen": "b"}, "'rejected' is missing"),
        ({"chosen": "yes", "rejected": "no"}, "share no beginning"),
        ({"chosen": [USER, GOOD], "rejected": [MORE, BAD]}, "share no first message"),
        ({"prompt": "a", "chosen": [GOOD], "rejected": "no"}, "'rejected' is"),
        ({"prompt": 3, "chosen": "a", "rejected": "b"}, "neither text nor messages"),
        ({"prompt": 3, "chosen": [GOOD], "rejected": [BAD]}, "neither text nor messages"),
        ({"prompt": "Else?", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, "do not begin with the prompt"),
    ],
)
def test_what_is_no_pair_is_refused(row, said):
    with pytest.raises(UserError, match=said):
        split_pair(row)
