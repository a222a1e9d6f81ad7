"""Every format of a preference pair gives the same prompt and answers."""

import pytest

from shiq_jax.data.pairs import split_pair
from shiq_jax.errors import UserError

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "Why is the sky blue?"}
CHOSEN = {"role": "assistant", "content": "Scattering."}
REJECTED = {"role": "assistant", "content": "Paint."}
FOLLOW_UP = {"role": "user", "content": "Go on."}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [USER], "chosen": [CHOSEN], "rejected": [REJECTED]},
        {"prompt": [USER], "chosen": [USER, CHOSEN], "rejected": [USER, REJECTED]},
        {"prompt": USER["content"], "chosen": [USER, CHOSEN], "rejected": [USER, REJECTED]},
        {"prompt": USER["content"], "chosen": [CHOSEN], "rejected": [REJECTED]},
        {"chosen": [USER, CHOSEN], "rejected": [USER, REJECTED]},
    ],
)
def test_all_formats_agree(row):
    assert split_pair(row) == ([USER], [CHOSEN], [REJECTED])


def test_system_message_before_a_text_prompt_is_part_of_the_prompt():
    row = {"prompt": USER["content"], "chosen": [SYSTEM, USER, CHOSEN], "rejected": [SYSTEM, USER, REJECTED]}
    assert split_pair(row) == ([SYSTEM, USER], [CHOSEN], [REJECTED])


def test_shared_turns_are_the_prompt():
    row = {"chosen": [USER, CHOSEN, FOLLOW_UP, CHOSEN], "rejected": [USER, CHOSEN, FOLLOW_UP, REJECTED]}
    assert split_pair(row) == ([USER, CHOSEN, FOLLOW_UP], [CHOSEN], [REJECTED])


def test_conversations_are_split_before_an_assistant_turn():
    stop = {"role": "user", "content": "Stop."}
    row = {"chosen": [USER, CHOSEN, FOLLOW_UP, CHOSEN], "rejected": [USER, CHOSEN, stop, REJECTED]}
    assert split_pair(row) == ([USER], [CHOSEN, FOLLOW_UP, CHOSEN], [CHOSEN, stop, REJECTED])


def test_equal_conversations_keep_their_answers():
    assert split_pair({"chosen": [USER, CHOSEN], "rejected": [USER, CHOSEN]}) == ([USER], [CHOSEN], [CHOSEN])


def test_text_answers_with_and_without_a_prompt():
    assert split_pair({"prompt": "Q:", "chosen": " yes", "rejected": " no"}) == ("Q:", " yes", " no")
    assert split_pair({"chosen": "Q: nor", "rejected": "Q: no"}) == ("Q:", " nor", " no")
    assert split_pair({"chosen": "Q\nyes", "rejected": "Q\nno"}) == ("Q\n", "yes", "no")
    assert split_pair({"prompt": [USER], "chosen": "yes", "rejected": "no"}) == ([USER], "yes", "no")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "rejected": "b"}, "'chosen' is missing"),
        ({"prompt": "a", "chosen": "b"}, "'rejected' is missing"),
        ({"chosen": "yes", "rejected": "no"}, "share no beginning"),
        ({"chosen": [USER, CHOSEN], "rejected": [FOLLOW_UP, REJECTED]}, "share no first message"),
        ({"prompt": "a", "chosen": [CHOSEN], "rejected": "no"}, "'rejected' is"),
        ({"prompt": 3, "chosen": "a", "rejected": "b"}, "neither text nor messages"),
        ({"prompt": 3, "chosen": [CHOSEN], "rejected": [REJECTED]}, "neither text nor messages"),
        ({"prompt": "Else?", "chosen": [USER, CHOSEN], "rejected": [USER, REJECTED]}, "do not begin with the prompt"),
    ],
)
def test_invalid_pairs_are_rejected(row, message):
    with pytest.raises(UserError, match=message):
        split_pair(row)
