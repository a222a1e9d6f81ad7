"""Labels of answers, and their pairing with answers to other prompts."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shiq_jax.errors import UserError
from shiq_jax.replay import Record
from shiq_jax.replay.labels import assign_labels, explicit_labels, labeled_records, mismatched_indices


def answers(*rows):
    """Records with the given (prompt, reward) and distinct answers."""
    return [
        Record(
            tokens=[prompt, 100 + number, 200 + number], action_mask=[0, 1, 1], rewards=[0.0, reward],
            group=f"{prompt}", prompt="{}", behaviour_logp=[-1.0, -1.0], logp=[-1.0, -1.0], lse=[2.0, 2.0],
        )
        for number, (prompt, reward) in enumerate(rows)
    ]  # fmt: skip


def test_labels_compare_returns_with_the_group_mean_or_a_threshold(make_buffer):
    buffer = make_buffer(answers((1, 0.1), (1, 0.2), (2, 5), (1, 0.3), (2, 1), (3, 9), (4, 0.1), (4, 0.1), (4, 0.1)))
    assert assign_labels(buffer, None).tolist() == [0, -1, 1, 1, 0, -1, -1, -1, -1]
    assert assign_labels(buffer, 1.0).tolist() == [0, 0, 1, 0, -1, 1, 0, 0, 0]


def test_explicit_labels_take_precedence_over_returns(make_buffer):
    """`label` takes precedence over `chosen`, and both over returns."""
    feedback = [{"label": False}, {"chosen": True}, {"chosen": True, "label": False}, {}, {"chosen": False}, {}]
    rewards = (9, 0, 9, 1, 9, 0)
    records = answers(*((1, reward) for reward in rewards))
    buffer = make_buffer(
        [dataclasses.replace(record, **fields) for record, fields in zip(records, feedback, strict=True)]
    )
    assert explicit_labels(buffer).tolist() == [0, 1, 0, -1, 0, -1]
    assert assign_labels(buffer, 0.5).tolist() == [0, 1, 0, 1, 0, 0]
    assert [record.label for record in labeled_records(buffer, 0.5, mismatched=False)] == [
        False,
        True,
        False,
        True,
        False,
        False,
    ]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=2, max_size=24).filter(lambda prompts: len(set(prompts)) > 1))
def test_mismatches_have_different_prompts(prompts):
    matches = mismatched_indices([bytes([prompt]) for prompt in prompts])
    assert all(prompts[match] != prompt for prompt, match in zip(prompts, matches, strict=True))


@pytest.mark.parametrize("sizes", [[1] * 5, [3] * 4])
def test_groups_of_equal_size_exchange_all_answers(sizes):
    prompts = list(itertools.chain.from_iterable([bytes([p])] * size for p, size in enumerate(sizes)))
    matches = mismatched_indices(prompts)
    assert sorted(matches) == list(range(len(prompts)))
    assert matches == [(index + sizes[0]) % len(prompts) for index in range(len(prompts))]


def test_a_single_prompt_is_rejected(make_buffer):
    buffer = make_buffer(answers((1, 0), (1, 1)))
    with pytest.raises(UserError, match="all usable answers have the same prompt.*apo_zero_unpaired"):
        list(labeled_records(buffer))
    assert len(list(labeled_records(buffer, mismatched=False))) == 2


def test_each_answer_is_grouped_with_a_mismatched_one(make_buffer):
    buffer = make_buffer(answers((1, 0.1), (1, 0.2), (1, 0.3), (2, 5), (2, 1)))
    records, kept = list(labeled_records(buffer)), buffer.read([0, 2, 3, 4])
    pairs = [records[index : index + 2] for index in range(0, len(records), 2)]
    assert [int(answer.tokens[1]) for answer, _ in pairs] == [100, 102, 103, 104]
    assert [answer.label for answer, _ in pairs] == [False, True, True, False]
    assert [answer.rewards.tolist() for answer, _ in pairs] == [record.rewards.tolist() for record in kept]
    first_tokens = {1: {100, 101, 102}, 2: {103, 104}}
    for answer, mismatch in pairs:
        prompt = int(answer.tokens[0])
        assert answer.group == mismatch.group and answer.lse.tolist() == [2.0, 2.0]
        assert mismatch.tokens[0] == prompt and int(mismatch.tokens[1]) not in first_tokens[prompt]
        assert mismatch.tokens[2] == mismatch.tokens[1] + 100 and mismatch.action_mask.tolist() == [False, True, True]
        assert not mismatch.rewards.any() and mismatch.logp is None
        assert mismatch.prompt is None and mismatch.label is None
    assert len({answer.group for answer, _ in pairs}) == 4


def test_without_mismatches_groups_and_statistics_are_kept(make_buffer):
    buffer = make_buffer(answers((1, 0.1), (1, 0.3), (2, 5)))
    records = list(labeled_records(buffer, mismatched=False))
    assert [record.group for record in records] == ["1", "1"] and [record.label for record in records] == [False, True]
    np.testing.assert_array_equal(records[0].lse, buffer[0].lse)


def test_mismatched_sequences_are_truncated(make_buffer):
    long = Record(tokens=[1, 2, 3, 4, 5], action_mask=[0, 0, 0, 0, 1], rewards=[1], group="a")
    short = Record(tokens=[9, 6, 7, 8, 5], action_mask=[0, 1, 0, 1, 1], rewards=[0, 0, 0], group="b")
    records = list(labeled_records(make_buffer([long, short]), 0.5, max_length=6))
    assert records[1].tokens.tolist() == [1, 2, 3, 4, 6, 7] and records[1].action_mask.tolist() == [0, 0, 0, 0, 1, 0]
    assert records[3].tokens.tolist() == [9, 5]


def test_all_ties_are_rejected(make_buffer):
    with pytest.raises(UserError, match="no answer is better or worse than the mean of its prompt's answers"):
        list(labeled_records(make_buffer(answers((1, 1), (2, 0)))))
    with pytest.raises(UserError, match="than the threshold 1, so none"):
        list(labeled_records(make_buffer(answers((1, 1), (2, 1)), name="other"), 1.0))
