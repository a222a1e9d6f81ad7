"""Which answers are good, and that the answers beside them come from other prompts."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shiq_jax.errors import UserError
from shiq_jax.replay import Record
from shiq_jax.replay.labels import given_labels, labelled, labels, mismatches


def answers(*rows):
    """Records of (prompt, reward); every answer is another one."""
    return [
        Record(
            tokens=[prompt, 100 + number, 200 + number], action_mask=[0, 1, 1], rewards=[0.0, reward],
            group=f"{prompt}", prompt="{}", behaviour_logp=[-1.0, -1.0], logp=[-1.0, -1.0], lse=[2.0, 2.0],
        )
        for number, (prompt, reward) in enumerate(rows)
    ]  # fmt: skip


def test_above_the_mean_of_its_prompt_is_good(make_buffer):
    buffer = make_buffer(answers((1, 0.1), (1, 0.2), (2, 5), (1, 0.3), (2, 1), (3, 9), (4, 0.1), (4, 0.1), (4, 0.1)))
    assert labels(buffer, None).tolist() == [0, -1, 1, 1, 0, -1, -1, -1, -1]
    assert labels(buffer, 1.0).tolist() == [0, 0, 1, 0, -1, 1, 0, 0, 0]


def test_what_the_data_say_goes_before_returns(make_buffer):
    """A label first, then the side of a preference; returns decide only about answers without either."""
    said = [{"label": False}, {"chosen": True}, {"chosen": True, "label": False}, {}, {"chosen": False}, {}]
    rewards = (9, 0, 9, 1, 9, 0)
    records = answers(*((1, reward) for reward in rewards))
    buffer = make_buffer([dataclasses.replace(record, **more) for record, more in zip(records, said, strict=True)])
    assert given_labels(buffer).tolist() == [0, 1, 0, -1, 0, -1]
    assert labels(buffer, 0.5).tolist() == [0, 1, 0, 1, 0, 0]
    assert [record.label for record in labelled(buffer, 0.5, mismatched=False)] == [
        False,
        True,
        False,
        True,
        False,
        False,
    ]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=2, max_size=24).filter(lambda prompts: len(set(prompts)) > 1))
def test_a_mismatch_has_another_prompt(prompts):
    found = mismatches([bytes([prompt]) for prompt in prompts])
    assert all(prompts[other] != prompt for prompt, other in zip(prompts, found, strict=True))


@pytest.mark.parametrize("sizes", [[1] * 5, [3] * 4])
def test_groups_of_one_size_exchange_all_their_answers(sizes):
    prompts = list(itertools.chain.from_iterable([bytes([p])] * size for p, size in enumerate(sizes)))
    found = mismatches(prompts)
    assert sorted(found) == list(range(len(prompts)))
    assert found == [(place + sizes[0]) % len(prompts) for place in range(len(prompts))]


def test_one_prompt_is_not_enough(make_buffer):
    buffer = make_buffer(answers((1, 0), (1, 1)))
    with pytest.raises(UserError, match="all answers that can be learned from have one prompt.*apo_zero_unpaired"):
        list(labelled(buffer))
    assert len(list(labelled(buffer, mismatched=False))) == 2


def test_an_answer_and_one_to_another_prompt_form_a_group(make_buffer):
    buffer = make_buffer(answers((1, 0.1), (1, 0.2), (1, 0.3), (2, 5), (2, 1)))
    found, kept = list(labelled(buffer)), buffer.read([0, 2, 3, 4])
    pairs = [found[place : place + 2] for place in range(0, len(found), 2)]
    assert [int(answer.tokens[1]) for answer, _ in pairs] == [100, 102, 103, 104]
    assert [answer.label for answer, _ in pairs] == [False, True, True, False]
    assert [answer.rewards.tolist() for answer, _ in pairs] == [record.rewards.tolist() for record in kept]
    own = {1: {100, 101, 102}, 2: {103, 104}}
    for answer, other in pairs:
        assert answer.group == other.group and answer.lse.tolist() == [2.0, 2.0]
        assert other.tokens[0] == answer.tokens[0] and int(other.tokens[1]) not in own[int(answer.tokens[0])]
        assert other.tokens[2] == other.tokens[1] + 100 and other.action_mask.tolist() == [False, True, True]
        assert not other.rewards.any() and other.logp is None and other.prompt is None and other.label is None
    assert len({answer.group for answer, _ in pairs}) == 4


def test_without_mismatches_groups_and_statistics_stay(make_buffer):
    buffer = make_buffer(answers((1, 0.1), (1, 0.3), (2, 5)))
    found = list(labelled(buffer, mismatched=False))
    assert [record.group for record in found] == ["1", "1"] and [record.label for record in found] == [False, True]
    np.testing.assert_array_equal(found[0].lse, buffer[0].lse)


def test_what_would_not_fit_is_cut_off(make_buffer):
    long = Record(tokens=[1, 2, 3, 4, 5], action_mask=[0, 0, 0, 0, 1], rewards=[1], group="a")
    short = Record(tokens=[9, 6, 7, 8, 5], action_mask=[0, 1, 0, 1, 1], rewards=[0, 0, 0], group="b")
    found = list(labelled(make_buffer([long, short]), 0.5, longest=6))
    assert found[1].tokens.tolist() == [1, 2, 3, 4, 6, 7] and found[1].action_mask.tolist() == [0, 0, 0, 0, 1, 0]
    assert found[3].tokens.tolist() == [9, 5]


def test_all_ties_are_refused(make_buffer):
    with pytest.raises(UserError, match="no answer is better or worse than the mean of its prompt's answers"):
        list(labelled(make_buffer(answers((1, 1), (2, 0)))))
    with pytest.raises(UserError, match="than the threshold 1, so none"):
        list(labelled(make_buffer(answers((1, 1), (2, 1)), name="other"), 1.0))
