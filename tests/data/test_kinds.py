"""Classification of rows, and the commands that can train on them."""

import pytest

from shiq_jax.data.kinds import classify

PAIR = {"prompt": "p", "chosen": "a", "rejected": "b"}
ANSWER_LIST = {"prompt": "p", "responses": ["a", "b"]}
OBJECTS = [{"text": "a", "rating": 4}, {"text": "b", "rating": "N/A"}]
ULTRAFEEDBACK = [
    {"response": text, "annotations": {"truth": {"Rating": rating}}} for text, rating in (("a", "3"), ("b", "N/A"))
]


@pytest.mark.parametrize(
    ("row", "contents", "objectives"),
    [
        ({"prompt": "p"}, "", ""),
        ({"prompt": "p", "label": 3}, "", ""),
        ({"prompt": "p", "answers": [{"f": {}}]}, "", ""),
        ({"tokens": [1], "action_mask": [0], "rewards": [0]}, "tokens scored", "shiq kto"),
        ({"tokens": [1], "action_mask": [0], "rewards": [0], "label": True}, "tokens label scored", "shiq kto"),
        ({"tokens": [1]}, "tokens", ""),
        ({"prompt": "p", "completion": "a"}, "completion", "sft"),
        ({"prompt": "p", "completion": "a", "reward": 1}, "completion scored", "shiq kto sft"),
        ({"prompt": "p", "completion": "a", "label": 0}, "completion label", "kto sft"),
        ({"prompt": "p", "completion": "a", "answers": ["a"]}, "completion answers", "sft"),
        ({"messages": []}, "messages", "sft"),
        ({"text": "t"}, "text", "sft"),
        (PAIR, "pair answers", "dpo kto"),
        (PAIR | {"score_chosen": 1, "score_rejected": 0}, "pair answers scored", "dpo shiq kto"),
        ({"prompt": "p", "chosen_response": "a", "rejected_response": "b"}, "pair answers", "dpo kto"),
        ({"prompt": "p", "chosen": "a"}, "", ""),
        (ANSWER_LIST, "answers", ""),
        (ANSWER_LIST | {"scores": [1, 2]}, "answers scored", "dpo shiq kto"),
        (ANSWER_LIST | {"ranks": [1, 2]}, "answers ranked", "dpo"),
        (ANSWER_LIST | {"ranks": [1, 2], "scores": [1, 2]}, "answers scored ranked", "dpo shiq kto"),
        ({"prompt": "p", "answers": OBJECTS}, "answers scored", "dpo shiq kto"),
        ({"instruction": "p", "completions": ULTRAFEEDBACK}, "answers scored", "dpo shiq kto"),
        # Lists with scores or ranks take precedence over pairs, and pairs over other lists.
        (PAIR | ANSWER_LIST, "pair answers", "dpo kto"),
        (PAIR | ANSWER_LIST | {"scores": [1, 2]}, "answers scored", "dpo shiq kto"),
    ],
)
def test_rows_are_classified_by_their_fields(row, contents, objectives):
    kind = classify(row)
    assert [name for name, value in kind._asdict().items() if value] == contents.split()
    assert kind.objectives == tuple(objectives.split())


@pytest.mark.parametrize(
    ("row", "contents", "objectives"),
    [
        (PAIR, "answers scored", "dpo shiq kto"),
        ({"prompt": "p", "completion": "a", "label": 1}, "completion", "sft"),
        ({"prompt": "p", "completion": "a", "label": 1, "grade": 2}, "completion scored", "shiq kto sft"),
        ({"prompt": "p", "completion": "a", "reward": 1}, "completion", "sft"),
        ({"prompt": "p"}, "", ""),
    ],
)
def test_named_score_overrides_labels_and_pairs(row, contents, objectives):
    kind = classify(row, "grade")
    assert [name for name, value in kind._asdict().items() if value] == contents.split()
    assert kind.objectives == tuple(objectives.split())
