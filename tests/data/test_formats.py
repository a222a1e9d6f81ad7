"""Someone's rows become records: which tokens are actions, where rewards stand, which rows form a group."""

import json

import numpy as np
import pytest

from shiq_jax.data.chat import encode_completion
from shiq_jax.data.formats import demonstrations, labelled, preferences, prompts, trajectories
from shiq_jax.data.import_context import ImportContext
from shiq_jax.errors import UserError
from shiq_jax.replay.buffer import Buffer
from shiq_jax.replay.export import record_to_json, to_dataset, to_jsonl
from shiq_jax.replay.records import validate
from shiq_jax.tasks.tiny import tiny_tokenizer

USER = {"role": "user", "content": "2+2?"}
CALL = {"role": "assistant", "content": "add(2, 2)"}
TOOL = {"role": "tool", "content": "4"}
ANSWER = {"role": "assistant", "content": "4"}
TOKENIZER = tiny_tokenizer()


@pytest.fixture
def write(tmp_path):
    def to_file(*rows, name="data.jsonl"):
        path = tmp_path / name
        path.write_text("\n".join(json.dumps(row) for row in rows))
        return path

    return to_file


def _said(record):
    return TOKENIZER.decode(record.tokens[record.action_mask].tolist())


def test_a_number_stands_on_the_last_action(write):
    (record,) = trajectories(write({"prompt": "sort 21:", "completion": "12", "reward": 0.5}), TOKENIZER)
    assert _said(record) == "12<eos>"
    assert record.rewards.tolist() == [0.0, 0.0, 0.5]
    assert json.loads(record.prompt) == {"prompt": "sort 21:"}


def test_a_list_stands_on_the_last_action_of_each_turn(write):
    row = {"prompt": [USER], "completion": [CALL, TOOL, ANSWER], "reward": [0.25, -1.0]}
    (record,) = trajectories(write(row), TOKENIZER)
    encoded = encode_completion(TOKENIZER, [USER], [CALL, TOOL, ANSWER])
    per_token = np.zeros(len(record.tokens))
    per_token[record.action_mask] = record.rewards
    assert per_token[encoded.turn_ends].tolist() == [0.25, -1.0]
    assert np.count_nonzero(per_token) == 2
    assert _said(record) == "add(2, 2)<|im_end|>4<|im_end|>"


def test_rows_with_one_prompt_form_a_group_unless_they_name_theirs(write):
    rows = [{"prompt": prompt, "completion": "x", "reward": 1} for prompt in ("a", "b", "a")]
    rows.append(rows[0] | {"group_id": 7, "user_id": "ann"})
    first, second, third, fourth = trajectories(write(*rows), TOKENIZER)
    assert first.group == third.group != second.group
    assert (fourth.group, fourth.user, first.user) == ("7", "ann", None)


def test_other_fields_stay_with_the_prompt_and_answers_do_not(write):
    row = {"prompt": "a", "completion": "x", "reward": 1, "answer": "y", "id": 3}
    (record,) = trajectories(write(row), TOKENIZER)
    assert json.loads(record.prompt) == {"prompt": "a", "answer": "y", "id": 3}


def test_token_rows_come_back_bit_for_bit(write, tmp_path):
    rows = [{"prompt": "a", "completion": "xyz", "reward": 0.1}, {"prompt": "b", "completion": "x", "reward": -3}]
    records = list(trajectories(write(*rows), TOKENIZER))
    again = list(trajectories(write(*map(record_to_json, records), name="tokens.jsonl"), TOKENIZER))
    assert again == records
    buffer = Buffer.create(tmp_path / "buffer")
    buffer.append(records)
    to_jsonl(buffer, tmp_path / "exported.jsonl")
    assert list(trajectories(tmp_path / "exported.jsonl", TOKENIZER)) == records
    to_dataset(buffer).save_to_disk(str(tmp_path / "dataset"))
    assert list(trajectories(tmp_path / "dataset", TOKENIZER)) == records


def test_statistics_of_token_rows_are_kept(write):
    row = {"tokens": [1, 5, 6], "action_mask": [False, True, True], "rewards": [0, 0, 1]}
    row |= {"logp": [None, -1.0, -2.0], "lse": [None, 3.0, 4.0]}
    (record,) = trajectories(write(row), TOKENIZER)
    assert record.logp.tolist() == [-1.0, -2.0] and record.lse.tolist() == [3.0, 4.0]


def test_a_preference_is_a_group_of_two(write):
    row = {"prompt": [USER], "chosen": [USER, ANSWER], "rejected": [USER, CALL]}
    good, bad, *others = preferences(write(row, row), TOKENIZER)
    assert (_said(good), _said(bad)) == ("4<|im_end|>", "add(2, 2)<|im_end|>")
    assert (good.rewards.sum(), bad.rewards.sum()) == (1.0, 0.0) and good.rewards[-1] == 1.0
    assert good.group == bad.group and (good.chosen, bad.chosen) == (True, False) and good.label is good.rank is None
    # The same pair twice is two pairs: a group of four would lose one.
    assert len({record.group for record in others}) == 1 and others[0].group != good.group


def test_plain_preferences_share_the_tokens_of_their_prompt(write):
    good, bad = preferences(write({"prompt": "Q:", "chosen": " yes", "rejected": " no"}), TOKENIZER)
    prompt = TOKENIZER("Q:").input_ids
    for record, text in ((good, " yes<eos>"), (bad, " no<eos>")):
        assert record.tokens[: len(prompt)].tolist() == prompt
        assert _said(record) == text


def test_labels_stay_with_their_answers(write):
    """The rewards are 1 and 0, for losses that read rewards."""
    rows = [
        {"prompt": "Q:", "completion": " yes", "label": True},
        {"prompt": "Q:", "completion": " no", "label": 0},
        {"prompt": [USER], "completion": [ANSWER], "label": 1, "user_id": "ann"},
        {"prompt": [USER], "chosen": [USER, ANSWER], "rejected": [USER, CALL]},
    ]
    found = list(labelled(write(*rows), TOKENIZER))
    assert [_said(record) for record in found] == [
        " yes<eos>", " no<eos>", "4<|im_end|>", "4<|im_end|>", "add(2, 2)<|im_end|>",
    ]  # fmt: skip
    assert [float(record.rewards.sum()) for record in found] == [1, 0, 1, 1, 0]
    assert [record.label for record in found] == [True, False, True, None, None]
    assert [record.chosen for record in found] == [None, None, None, True, False]
    assert found[0].group == found[1].group != found[2].group and json.loads(found[0].prompt) == {"prompt": "Q:"}


def test_scores_are_labels_to_be(write):
    rows = [{"prompt": "a", "completions": ["x", "y", ""], "scores": [3, 4, 5]}, {"prompt": "b", "completion": "z"}]
    scored = list(labelled(write(rows[0], name="scored.jsonl"), TOKENIZER))
    assert [float(record.rewards.sum()) for record in scored] == [3, 4]
    (record,) = labelled(write(rows[1] | {"label": True, "grade": -2}), TOKENIZER, ImportContext(score="grade"))
    assert float(record.rewards.sum()) == -2 and record.label is None, "the score decides"


def test_labels_and_scores_are_not_mixed(write):
    labels, scores = ({"prompt": "a", "completion": "b", name: 1} for name in ("label", "reward"))
    tokens = {"tokens": [1, 2], "action_mask": [0, 1], "rewards": [0, 3]}
    for other, said in ((scores, "'reward'"), (tokens, "'rewards'")):
        with pytest.raises(
            UserError, match=f"line 2: the scores of rows before this one stand in 'label', .*in {said}"
        ):
            list(labelled(write(labels, other), TOKENIZER))


def test_a_scored_answer_keeps_its_label_too(write):
    row = {"prompt": "a", "completion": "b", "reward": 0.25}
    found = list(trajectories(write(row, row | {"label": 0}, row | {"label": "spam"}), TOKENIZER))
    assert [record.label for record in found] == [None, False, None]


def test_demonstrations_in_three_forms(write):
    rows = [
        {"prompt": "Q:", "completion": "A"},
        {"messages": [USER, CALL, TOOL, ANSWER]},
        {"text": "once"},
    ]
    plain, chat, text = demonstrations(write(*rows), TOKENIZER)
    assert [_said(record) for record in (plain, chat, text)] == [
        "A<eos>",
        "add(2, 2)<|im_end|>4<|im_end|>",
        "once<eos>",
    ]
    for record in (plain, chat, text):
        validate(record, vocab_size=len(TOKENIZER))
        assert not record.rewards.any()
    assert chat.tokens.tolist() == encode_completion(TOKENIZER, [USER], [CALL, TOOL, ANSWER]).tokens.tolist()


def test_prompts_keep_what_the_reward_needs(write):
    rows = [{"prompt": "a", "answer": "b"}, {"prompt": [USER], "answers": [{"f": {}}]}]
    assert prompts(write(*rows)) == rows


GOOD_ROW = {"prompt": "a", "completion": "b", "reward": 1}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"prompt": None}, "'prompt' is missing"),
        ({"prompt": 5}, "'prompt' is of type int"),
        ({"prompt": []}, "'prompt' is an empty list"),
        ({"prompt": [{"content": "x"}]}, "'prompt', message 1 has no 'role'"),
        ({"prompt": [{"role": "user"}]}, "'prompt', message 1 has no 'content'"),
        ({"completion": None}, "'completion' is missing"),
        ({"completion": ""}, "'completion' is empty"),
        ({"completion": [USER]}, "at least one assistant message"),
        ({"reward": None}, "'reward' is missing"),
        ({"reward": "high"}, "'reward' holds"),
        ({"reward": [1, 2]}, "'reward' has 2 entries"),
        ({"reward": [float("nan")]}, "'reward' holds NaN"),
        ({"reward": 10**400}, "'reward' holds 1000"),
        ({"tokens": [1, 2]}, "'action_mask' is missing"),
        ({"tokens": [1, 2], "action_mask": [True, True], "rewards": [0, 0]}, "first token"),
        ({"tokens": [1, 2], "action_mask": [False, False], "rewards": [0, 0]}, "none of its 2 tokens is an action"),
        ({"tokens": [1, 2], "group": "g"}, "'action_mask' is missing"),
    ],
)
def test_a_bad_row_is_named_with_its_line_and_field(write, change, said):
    path = write(GOOD_ROW, GOOD_ROW | change)
    with pytest.raises(UserError, match=said) as refusal:
        list(trajectories(path, TOKENIZER))
    assert str(refusal.value).startswith(f"{path}, line 2")


@pytest.mark.parametrize(
    ("read", "row", "said"),
    [
        (preferences, {"prompt": "a", "chosen": "", "rejected": "b"}, "'chosen' is empty"),
        (preferences, {"prompt": [USER], "chosen": [USER], "rejected": [USER]}, "'chosen' is an empty list"),
        (labelled, {"prompt": "a", "completion": "b"}, "'label' is missing.*true for a desirable answer"),
        (labelled, {"prompt": "a", "completion": "b", "label": "good"}, "'label' holds \"good\": expected true"),
        (labelled, {"prompt": "a", "completion": "b", "label": None}, "'label' is missing"),
        (labelled, {"prompt": "a", "completion": "b", "label": 2}, "'label' holds 2: expected true"),
        (labelled, {"prompt": "a", "completion": "", "label": True}, "'completion' is empty"),
        (labelled, {"prompt": "a", "label": True}, "'completion' is missing"),
        (labelled, {"completion": "a", "label": True}, "'prompt' is missing"),
        (demonstrations, {"prompt": "a"}, "'completion' is missing"),
        (demonstrations, {"messages": [ANSWER]}, "'messages' has the roles assistant"),
        (demonstrations, {"text": ""}, "'text' is empty"),
        (lambda path, _: prompts(path), {"completion": "a"}, "'prompt' is missing"),
    ],
)
def test_rows_of_the_other_formats_are_checked_too(write, read, row, said):
    with pytest.raises(UserError, match=said) as refusal:
        list(read(write(row), TOKENIZER))
    assert "line 1" in str(refusal.value)


def test_a_function_scores_completions_without_rewards(write):
    """It reads the row without its completion; a completion that has a reward keeps it."""
    asked = []

    def reward(row, completion):
        asked.append(row)
        return len(completion)

    row = {"prompt": "a", "completion": "xyz", "answer": 3}
    (record,) = trajectories(write(row), TOKENIZER, ImportContext(reward=reward))
    assert record.rewards[-1] == 3 and asked == [{"prompt": "a", "answer": 3}]


def test_a_named_score_is_kept_beside_the_reward(write):
    rows = [{"prompt": "a", "completion": "b", "grade": grade} for grade in (0.1, True)]
    found = list(trajectories(write(*rows), TOKENIZER, ImportContext(score="grade")))
    assert [record.score for record in found] == [0.1, 1.0] and found[0].rewards[-1] == np.float32(0.1)


def test_exported_answers_keep_what_was_said_of_them(write):
    """Rows of tokens are read by kto with their labels, whatever made them."""
    rows = [{"prompt": "Q:", "completion": " yes", "label": True}, {"prompt": "Q:", "completion": " no", "label": 0}]
    records = list(labelled(write(*rows), TOKENIZER))
    again = write(*map(record_to_json, records), name="tokens.jsonl")
    assert list(labelled(again, TOKENIZER)) == records
