"""What rows hold, and which commands learn from them."""

import pytest

from shiq_jax.data.kinds import classify

PAIR = {"prompt": "p", "chosen": "a", "rejected": "b"}
LISTED = {"prompt": "p", "responses": ["a", "b"]}
OBJECTS = [{"text": "a", "rating": 4}, {"text": "b", "rating": "N/A"}]
ULTRAFEEDBACK = [
    {"response": text, "annotations": {"truth": {"Rating": rating}}} for text, rating in (("a", "3"), ("b", "N/A"))
]


@pytest.mark.parametrize(
    ("row", "holds", "objectives"),
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
        (LISTED, "answers", ""),
        (LISTED | {"scores": [1, 2]}, "answers scored", "dpo shiq kto"),
        (LISTED | {"ranks": [1, 2]}, "answers ranked", "dpo"),
        (LISTED | {"ranks": [1, 2], "scores": [1, 2]}, "answers scored ranked", "dpo shiq kto"),
        ({"prompt": "p", "answers": OBJECTS}, "answers scored", "dpo shiq kto"),
        ({"instruction": "p", "completions": ULTRAFEEDBACK}, "answers scored", "dpo shiq kto"),
        # A list that compares its answers says more than two sides, and these more than one that does not.
        (PAIR | LISTED, "pair answers", "dpo kto"),
        (PAIR | LISTED | {"scores": [1, 2]}, "answers scored", "dpo shiq kto"),
    ],
)
def test_a_row_is_told_from_its_fields(row, holds, objectives):
    kind = classify(row)
    assert [name for name, held in kind._asdict().items() if held] == holds.split()
    assert kind.objectives == tuple(objectives.split())


@pytest.mark.parametrize(
    ("row", "holds", "objectives"),
    [
        (PAIR, "answers scored", "dpo shiq kto"),
        ({"prompt": "p", "completion": "a", "label": 1}, "completion", "sft"),
        ({"prompt": "p", "completion": "a", "label": 1, "grade": 2}, "completion scored", "shiq kto sft"),
        ({"prompt": "p", "completion": "a", "reward": 1}, "completion", "sft"),
        ({"prompt": "p"}, "", ""),
    ],
)
def test_a_named_score_decides_instead_of_labels_and_sides(row, holds, objectives):
    kind = classify(row, "grade")
    assert [name for name, held in kind._asdict().items() if held] == holds.split()
    assert kind.objectives == tuple(objectives.split())
