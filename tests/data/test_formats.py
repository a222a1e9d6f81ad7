"""Conversion of rows to records: action masks, rewards and groups."""

import json

import numpy as np
import pytest

from shiq_jax.data.chat import encode_completion
from shiq_jax.data.formats import demonstrations, preferences, prompts, trajectories, unpaired_preferences
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


def _decode_actions(record):
    return TOKENIZER.decode(record.tokens[record.action_mask].tolist())


def test_scalar_reward_is_assigned_to_the_last_action(write):
    (record,) = trajectories(write({"prompt": "sort 21:", "completion": "12", "reward": 0.5}), TOKENIZER)
    assert _decode_actions(record) == "12<eos>"
    assert record.rewards.tolist() == [0.0, 0.0, 0.5]
    assert json.loads(record.prompt) == {"prompt": "sort 21:"}


def test_list_of_rewards_is_assigned_to_the_turn_ends(write):
    row = {"prompt": [USER], "completion": [CALL, TOOL, ANSWER], "reward": [0.25, -1.0]}
    (record,) = trajectories(write(row), TOKENIZER)
    encoded = encode_completion(TOKENIZER, [USER], [CALL, TOOL, ANSWER])
    per_token = np.zeros(len(record.tokens))
    per_token[record.action_mask] = record.rewards
    assert per_token[encoded.turn_ends].tolist() == [0.25, -1.0]
    assert np.count_nonzero(per_token) == 2
    assert _decode_actions(record) == "add(2, 2)<|im_end|>4<|im_end|>"


def test_rows_are_grouped_by_prompt_or_group_id(write):
    rows = [{"prompt": prompt, "completion": "x", "reward": 1} for prompt in ("a", "b", "a")]
    rows.append(rows[0] | {"group_id": 7, "user_id": "ann"})
    first, second, third, fourth = trajectories(write(*rows), TOKENIZER)
    assert first.group == third.group != second.group
    assert (fourth.group, fourth.user, first.user) == ("7", "ann", None)


def test_prompt_keeps_other_fields_but_no_completions(write):
    row = {"prompt": "a", "completion": "x", "reward": 1, "answer": "y", "id": 3}
    (record,) = trajectories(write(row), TOKENIZER)
    assert json.loads(record.prompt) == {"prompt": "a", "answer": "y", "id": 3}


def test_token_rows_round_trip_exactly(write, tmp_path):
    rows = [{"prompt": "a", "completion": "xyz", "reward": 0.1}, {"prompt": "b", "completion": "x", "reward": -3}]
    records = list(trajectories(write(*rows), TOKENIZER))
    assert list(trajectories(write(*map(record_to_json, records), name="tokens.jsonl"), TOKENIZER)) == records
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


def test_preference_is_a_group_of_two(write):
    row = {"prompt": [USER], "chosen": [USER, ANSWER], "rejected": [USER, CALL]}
    chosen, rejected, *second = preferences(write(row, row), TOKENIZER)
    assert (_decode_actions(chosen), _decode_actions(rejected)) == ("4<|im_end|>", "add(2, 2)<|im_end|>")
    assert (chosen.rewards.sum(), rejected.rewards.sum()) == (1.0, 0.0) and chosen.rewards[-1] == 1.0
    assert chosen.group == rejected.group and (chosen.chosen, rejected.chosen) == (True, False)
    assert chosen.label is chosen.rank is None
    # A repeated pair forms a second group, because a group of four would give only one pair.
    assert len({record.group for record in second}) == 1 and second[0].group != chosen.group


def test_text_preferences_share_their_prompt_tokens(write):
    chosen, rejected = preferences(write({"prompt": "Q:", "chosen": " yes", "rejected": " no"}), TOKENIZER)
    prompt = TOKENIZER("Q:").input_ids
    for record, text in ((chosen, " yes<eos>"), (rejected, " no<eos>")):
        assert record.tokens[: len(prompt)].tolist() == prompt
        assert _decode_actions(record) == text


def test_labels_are_kept_and_become_rewards(write):
    rows = [
        {"prompt": "Q:", "completion": " yes", "label": True},
        {"prompt": "Q:", "completion": " no", "label": 0},
        {"prompt": [USER], "completion": [ANSWER], "label": 1, "user_id": "ann"},
        {"prompt": [USER], "chosen": [USER, ANSWER], "rejected": [USER, CALL]},
    ]
    records = list(unpaired_preferences(write(*rows), TOKENIZER))
    assert [_decode_actions(record) for record in records] == [
        " yes<eos>", " no<eos>", "4<|im_end|>", "4<|im_end|>", "add(2, 2)<|im_end|>",
    ]  # fmt: skip
    assert [float(record.rewards.sum()) for record in records] == [1, 0, 1, 1, 0]
    assert [record.label for record in records] == [True, False, True, None, None]
    assert [record.chosen for record in records] == [None, None, None, True, False]
    assert records[0].group == records[1].group != records[2].group
    assert json.loads(records[0].prompt) == {"prompt": "Q:"}


def test_unpaired_preferences_accept_scores(write):
    rows = [{"prompt": "a", "completions": ["x", "y", ""], "scores": [3, 4, 5]}, {"prompt": "b", "completion": "z"}]
    scored = list(unpaired_preferences(write(rows[0], name="scored.jsonl"), TOKENIZER))
    assert [float(record.rewards.sum()) for record in scored] == [3, 4]
    (record,) = unpaired_preferences(
        write(rows[1] | {"label": True, "grade": -2}), TOKENIZER, ImportContext(score="grade")
    )
    assert float(record.rewards.sum()) == -2 and record.label is None, "a named score overrides the label"


def test_labels_and_scores_cannot_be_mixed(write):
    labels, scores = ({"prompt": "a", "completion": "b", name: 1} for name in ("label", "reward"))
    tokens = {"tokens": [1, 2], "action_mask": [0, 1], "rewards": [0, 3]}
    for row, field in ((scores, "'reward'"), (tokens, "'rewards'")):
        message = f"line 2: previous rows have their scores in 'label', but this row has them in {field}"
        with pytest.raises(UserError, match=message):
            list(unpaired_preferences(write(labels, row), TOKENIZER))


def test_scored_answers_keep_their_labels(write):
    row = {"prompt": "a", "completion": "b", "reward": 0.25}
    records = list(trajectories(write(row, row | {"label": 0}, row | {"label": "spam"}), TOKENIZER))
    assert [record.label for record in records] == [None, False, None]


def test_demonstrations_in_three_formats(write):
    rows = [
        {"prompt": "Q:", "completion": "A"},
        {"messages": [USER, CALL, TOOL, ANSWER]},
        {"text": "once"},
    ]
    plain, chat, text = demonstrations(write(*rows), TOKENIZER)
    assert [_decode_actions(record) for record in (plain, chat, text)] == [
        "A<eos>",
        "add(2, 2)<|im_end|>4<|im_end|>",
        "once<eos>",
    ]
    for record in (plain, chat, text):
        validate(record, vocab_size=len(TOKENIZER))
        assert not record.rewards.any()
    assert chat.tokens.tolist() == encode_completion(TOKENIZER, [USER], [CALL, TOOL, ANSWER]).tokens.tolist()


def test_prompts_keep_all_fields(write):
    rows = [{"prompt": "a", "answer": "b"}, {"prompt": [USER], "answers": [{"f": {}}]}]
    assert prompts(write(*rows)) == rows


VALID_ROW = {"prompt": "a", "completion": "b", "reward": 1}


@pytest.mark.parametrize(
    ("change", "message"),
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
        ({"reward": "high"}, "'reward' contains"),
        ({"reward": [1, 2]}, "'reward' has 2 entries"),
        ({"reward": [float("nan")]}, "'reward' contains NaN"),
        ({"reward": 10**400}, "'reward' contains 1000"),
        ({"tokens": [1, 2]}, "'action_mask' is missing"),
        ({"tokens": [1, 2], "action_mask": [True, True], "rewards": [0, 0]}, "first token"),
        ({"tokens": [1, 2], "action_mask": [False, False], "rewards": [0, 0]}, "none of its 2 tokens is an action"),
        ({"tokens": [1, 2], "group": "g"}, "'action_mask' is missing"),
    ],
)
def test_invalid_trajectories_are_reported_with_line_and_field(write, change, message):
    path = write(VALID_ROW, VALID_ROW | change)
    with pytest.raises(UserError, match=message) as error:
        list(trajectories(path, TOKENIZER))
    assert str(error.value).startswith(f"{path}, line 2")


@pytest.mark.parametrize(
    ("read", "row", "message"),
    [
        (preferences, {"prompt": "a", "chosen": "", "rejected": "b"}, "'chosen' is empty"),
        (
            preferences,
            {"prompt": [USER], "chosen": [USER], "rejected": [USER]},
            "'chosen' ends with a message of the role 'user'",
        ),
        (unpaired_preferences, {"prompt": "a", "completion": "b"}, "'label' is missing.*true for a desirable answer"),
        (
            unpaired_preferences,
            {"prompt": "a", "completion": "b", "label": "good"},
            "'label' is \"good\": expected true",
        ),
        (unpaired_preferences, {"prompt": "a", "completion": "b", "label": None}, "'label' is missing"),
        (unpaired_preferences, {"prompt": "a", "completion": "b", "label": 2}, "'label' is 2: expected true"),
        (unpaired_preferences, {"prompt": "a", "completion": "", "label": True}, "'completion' is empty"),
        (unpaired_preferences, {"prompt": "a", "label": True}, "'completion' is missing"),
        (unpaired_preferences, {"completion": "a", "label": True}, "'prompt' is missing"),
        (demonstrations, {"prompt": "a"}, "'completion' is missing"),
        (demonstrations, {"messages": [ANSWER]}, "'messages' has the roles assistant"),
        (demonstrations, {"text": ""}, "'text' is empty"),
        (lambda path, _: prompts(path), {"completion": "a"}, "'prompt' is missing"),
    ],
)
def test_invalid_rows_of_other_formats_are_reported(write, read, row, message):
    with pytest.raises(UserError, match=message) as error:
        list(read(write(row), TOKENIZER))
    assert "line 1" in str(error.value)


def test_reward_function_scores_completions_without_rewards(write):
    """The reward function receives the row without its completion."""
    scored_rows = []

    def reward(row, completion):
        scored_rows.append(row)
        return len(completion)

    row = {"prompt": "a", "completion": "xyz", "answer": 3}
    (record,) = trajectories(write(row), TOKENIZER, ImportContext(reward=reward))
    assert record.rewards[-1] == 3 and scored_rows == [{"prompt": "a", "answer": 3}]


def test_named_score_is_stored_with_the_reward(write):
    rows = [{"prompt": "a", "completion": "b", "grade": grade} for grade in (0.1, True)]
    records = list(trajectories(write(*rows), TOKENIZER, ImportContext(score="grade")))
    assert [record.score for record in records] == [0.1, 1.0] and records[0].rewards[-1] == np.float32(0.1)


def test_exported_labels_are_read_back(write):
    rows = [{"prompt": "Q:", "completion": " yes", "label": True}, {"prompt": "Q:", "completion": " no", "label": 0}]
    records = list(unpaired_preferences(write(*rows), TOKENIZER))
    exported = write(*map(record_to_json, records), name="tokens.jsonl")
    assert list(unpaired_preferences(exported, TOKENIZER)) == records
