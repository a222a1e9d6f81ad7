"""Rows with several answers become scored groups and preference pairs, in every supported format."""

import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from shiq_jax.data.answers import detect_layout, extract_answers, with_prompt
from shiq_jax.data.chat import encode_prompt
from shiq_jax.data.files import rows
from shiq_jax.data.formats import preferences, prompts, trajectories
from shiq_jax.data.import_context import ImportContext
from shiq_jax.errors import UserError
from shiq_jax.replay import Buffer, pack_groups
from shiq_jax.tasks.tiny import tiny_tokenizer

DIRECTORY = Path(__file__).parent
ULTRAFEEDBACK, BINARIZED, RANKED = (
    DIRECTORY / f"{name}.jsonl" for name in ("ultrafeedback", "ultrafeedback_binarized", "ranked")
)
TOKENIZER = tiny_tokenizer()
SCORED = {"prompt": "p", "responses": ["a", "b"], "scores": [1, 2]}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def decode(record) -> tuple[str, str]:
    """Prompt and answer of a record, decoded without special tokens."""
    parts = (record.tokens[~record.action_mask], record.tokens[record.action_mask])
    return tuple(TOKENIZER.decode(part.tolist(), skip_special_tokens=True) for part in parts)


def decode_answers(records) -> list[str]:
    return [decode(record)[1] for record in records]


def length_reward(row, completion: str) -> float:
    return float(len(completion))


def test_scored_answers_become_groups_and_unusable_ones_are_counted():
    context = ImportContext()
    records = list(trajectories(ULTRAFEEDBACK, TOKENIZER, context))
    expected = {}
    for row in rows(ULTRAFEEDBACK):
        for answer in row["completions"]:
            ratings = [entry["Rating"] for entry in answer["annotations"].values()]
            numbers = [float(rating) for rating in ratings if rating != "N/A"]
            if answer["response"] and numbers:
                expected[answer["response"]] = (row["instruction"], np.mean(numbers))
    assert decode_answers(records) == list(expected)
    groups: dict[str, set] = {}
    for record, (instruction, score) in zip(records, expected.values(), strict=True):
        prompt = encode_prompt(TOKENIZER, [{"role": "user", "content": instruction}])
        assert record.tokens[: len(prompt)].tolist() == prompt and not record.action_mask[: len(prompt)].any()
        assert record.rewards[-1] == pytest.approx(score) and not record.rewards[:-1].any()
        groups.setdefault(record.group, set()).add(instruction)
        assert "completions" not in json.loads(record.prompt)
    assert sorted(map(len, groups.values())) == [1] * 6
    assert +context.skipped == Counter(
        {"empty answers": 1, "answers without a number in 'fine-grained_score'": 1, "prompts without an answer": 1}
    )


def test_pairs_are_the_best_and_worst_answers(tmp_path):
    buffer, context = Buffer.create(tmp_path / "buffer"), ImportContext()
    buffer.append(trajectories(ULTRAFEEDBACK, TOKENIZER))
    records = list(preferences(ULTRAFEEDBACK, TOKENIZER, context))
    pairs = pack_groups(buffer, "pair")
    expected = [buffer[number] for ((best, worst),) in pairs for number in (best, worst)]
    assert [record.tokens.tolist() for record in records] == [record.tokens.tolist() for record in expected]
    assert [record.rewards.tolist() for record in records] == [record.rewards.tolist() for record in expected]
    assert len(pairs) == 5 and pairs.skipped == 1
    # One group ties, and one prompt has no answers.
    assert context.skipped["prompts without two answers that differ in score or rank"] == 2
    pair_buffer = Buffer.create(tmp_path / "pairs")
    pair_buffer.append(records)
    assert list(pack_groups(pair_buffer, "pair")) == [((2 * number, 2 * number + 1),) for number in range(5)]
    ranked = Buffer.create(tmp_path / "ranked")
    ranked.append(preferences(RANKED, TOKENIZER))
    assert list(pack_groups(ranked, "pair")) == [((2 * number, 2 * number + 1),) for number in range(5)]


def test_score_option_selects_the_field():
    pairs = decode_answers(preferences(ULTRAFEEDBACK, TOKENIZER, ImportContext(score="overall_score")))
    # The overall score gives the wrong answer a 10, and separates the two answers whose mean ratings tie.
    assert pairs[4:6] == ["d o g", "cat"] and pairs[8:10] == ["1 2", "one two"]


def test_binarized_rows_give_groups_of_two_and_pairs():
    groups, pairs = list(trajectories(BINARIZED, TOKENIZER)), list(preferences(BINARIZED, TOKENIZER))
    source = list(rows(BINARIZED))
    assert [float(record.rewards.sum()) for record in groups] == [
        row[f"score_{side}"] for row in source for side in ("chosen", "rejected")
    ]
    assert [record.tokens.tolist() for record in groups] == [record.tokens.tolist() for record in pairs]
    assert [float(record.rewards.sum()) for record in pairs] == [1.0, 0.0] * 6
    for records in (groups, pairs):
        assert [record.chosen for record in records] == [True, False] * 6
        assert [record.score for record in records] == [float(record.rewards.sum()) for record in groups]
    assert decode_answers(pairs) == [row[side][-1]["content"] for row in source for side in ("chosen", "rejected")]
    for first, second in zip(groups[::2], groups[1::2], strict=True):
        assert first.group == second.group and decode(first)[0] == decode(second)[0]
    # Only the score option makes scores decide pairs; then ties are skipped.
    context = ImportContext(score="score")
    scored = list(preferences(BINARIZED, TOKENIZER, context))
    assert decode_answers(scored) == decode_answers(pairs[:4] + pairs[6:]) and {record.chosen for record in scored} == {
        None
    }


def test_ranks_give_pairs_but_no_rewards():
    records = list(preferences(RANKED, TOKENIZER))
    pairs, expected, ranks = decode_answers(records), [], []
    for row in rows(RANKED):
        ordered = sorted(row["answers"], key=lambda answer: answer["rank"])
        if ordered[0]["rank"] < ordered[-1]["rank"]:
            expected += [ordered[0]["answer"], ordered[-1]["answer"]]
            ranks += [ordered[0]["rank"], ordered[-1]["rank"]]
    assert pairs == expected and len(pairs) == 10 and [record.rank for record in records] == ranks
    # Ranked pairs have the rewards 1 and 0, like chosen and rejected.
    assert [record.rewards.sum() for record in records] == [1.0, 0.0] * 5
    assert [record.rewards[:-1].any() for record in records] == [False] * 10
    with pytest.raises(UserError, match="line 1: .*ranks are not rewards, so .*--reward module:function, or .* dpo"):
        list(trajectories(RANKED, TOKENIZER))


def test_reward_function_scores_answers_without_scores():
    scored_rows = []

    def reward(row, completion):
        scored_rows.append(row)
        return length_reward(row, completion)

    records = list(trajectories(RANKED, TOKENIZER, ImportContext(reward=reward)))
    assert [float(record.rewards.sum()) for record in records] == [float(len(text)) for text in decode_answers(records)]
    assert [json.loads(record.prompt) for record in records] == scored_rows and "answers" not in scored_rows[0]
    # Scores in the data take precedence over the reward function.
    records = list(trajectories(ULTRAFEEDBACK, TOKENIZER, ImportContext(reward=reward)))
    assert records == list(trajectories(ULTRAFEEDBACK, TOKENIZER))


def test_reward_function_receives_the_text_of_a_message(tmp_path):
    unscored = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in rows(BINARIZED)]
    path = write(tmp_path / "unscored.jsonl", unscored)
    records = list(trajectories(path, TOKENIZER, ImportContext(reward=length_reward)))
    assert [float(record.rewards.sum()) for record in records] == [float(len(text)) for text in decode_answers(records)]
    with pytest.raises(
        UserError, match="line 1: the row has no scores: add score_chosen and score_rejected, .*--reward"
    ):
        list(trajectories(path, TOKENIZER))
    assert decode_answers(preferences(path, TOKENIZER)) == decode_answers(records)


def as_lists(row):
    answers = row["completions"]
    scores = extract_answers(row).scores
    kept = {name: row[name] for name in ("source", "instruction", "models", "correct_answers", "incorrect_answers")}
    return kept | {"generations": [answer["response"] for answer in answers], "ratings": scores}


def as_text_pairs(row):
    sides = {f"{side}_response": row[side][-1]["content"] for side in ("chosen", "rejected")}
    scores = {f"{side}_avg_rating": row[f"score_{side}"] for side in ("chosen", "rejected")}
    return {"instruction": row["prompt"]} | sides | scores


def with_dashed_scores(row):
    scores = {f"{side}-rating": row[f"score_{side}"] for side in ("chosen", "rejected")}
    return {name: row[name] for name in ("prompt", "chosen", "rejected")} | scores


@pytest.mark.parametrize(
    "source, convert",
    [(ULTRAFEEDBACK, as_lists), (BINARIZED, as_text_pairs), (BINARIZED, with_dashed_scores)],
)
def test_other_formats_give_the_same_records(source, convert, tmp_path):
    converted = write(tmp_path / "converted.jsonl", [convert(row) for row in rows(source)])
    for read in (trajectories, preferences):
        assert_same_sequences(read(converted, TOKENIZER), read(source, TOKENIZER))


def assert_same_sequences(records, expected):
    for record, other in zip(records, expected, strict=True):
        assert record.tokens.tolist() == other.tokens.tolist() and record.rewards.tolist() == other.rewards.tolist()


def test_parquet_gives_the_same_records_as_jsonl(tmp_path):
    import datasets

    for source in (ULTRAFEEDBACK, BINARIZED, RANKED):
        # In a table, fields that a row lacks are null.
        dataset = datasets.Dataset.from_list([json.loads(line) for line in source.read_text().splitlines()])
        dataset.to_parquet(tmp_path / "table.parquet")
        assert decode_answers(preferences(tmp_path / "table.parquet", TOKENIZER)) == decode_answers(
            preferences(source, TOKENIZER)
        )
        if source is not RANKED:
            assert_same_sequences(trajectories(tmp_path / "table.parquet", TOKENIZER), trajectories(source, TOKENIZER))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([SCORED | {"scores": [1]}], "line 1: field 'scores' has 1 entries for 2 answers"),
        ([SCORED | {"scores": [1, math.inf]}], "line 1: field 'scores' contains inf: expected finite numbers"),
        ([SCORED | {"responses": ["a", {"response": "b"}]}], "line 1: field 'responses' mixes text with objects"),
        ([SCORED | {"responses": [{"score": 1}, {"text": "b"}]}], "line 1: field 'responses', answer 1 has no text"),
        ([{name: SCORED[name] for name in ("responses", "scores")}], "line 1: field 'prompt' is missing"),
        ([{name: SCORED[name] for name in ("prompt", "responses")}], "line 1: the row has no scores: .*--reward"),
        ([SCORED, {"prompt": "p", "completions": [{"text": "a", "score": 1}]}], "line 2: .*'scores', .*--score"),
        ([SCORED, {"prompt": "p", "completion": "a", "reward": 1}], "line 2: .*one scale"),
    ],
)  # fmt: skip
def test_invalid_answers_are_reported_with_their_line(data, message, tmp_path):
    with pytest.raises(UserError, match=message):
        list(trajectories(write(tmp_path / "data.jsonl", data), TOKENIZER))


def test_ranks_must_be_numbers(tmp_path):
    path = write(tmp_path / "data.jsonl", [{"prompt": "p", "responses": ["a", "b"], "ranks": [1, None]}])
    with pytest.raises(UserError, match="line 1: the ranks of the answers are"):
        list(preferences(path, TOKENIZER))


def test_the_next_best_answer_replaces_a_filtered_one():
    context = ImportContext(accept=lambda record: decode(record)[1] != "An apple.")
    assert "An apple." not in decode_answers(trajectories(ULTRAFEEDBACK, TOKENIZER, context))
    assert decode_answers(preferences(ULTRAFEEDBACK, TOKENIZER, context))[:2] == ["A pear, or a plum.", "A carrot."]
    pairs = decode_answers(preferences(BINARIZED, TOKENIZER, context))
    assert len(pairs) == 10 and "A carrot." not in pairs


def test_prompts_of_answer_rows():
    for source in (ULTRAFEEDBACK, BINARIZED):
        evaluated = [row["prompt"] for row in prompts(source)]
        assert all(message["role"] == "user" for (message,) in evaluated)
        trained = {json.dumps(json.loads(record.prompt)["prompt"]) for record in trajectories(source, TOKENIZER)}
        assert trained <= {json.dumps(prompt) for prompt in evaluated}
    assert with_prompt({"prompt": "p", "answers": ["a"]}) == {"prompt": "p", "answers": ["a"]}
    for row in ({"prompt": "p", "answer": "a"}, {"prompt": "p", "chosen": "a"}):
        assert not detect_layout(row).has_answers


@pytest.mark.parametrize("score", [math.nan, None, "N/A", "", True])
def test_answers_without_a_numeric_score_are_skipped(score, tmp_path):
    context = ImportContext()
    path = write(tmp_path / "data.jsonl", [SCORED | {"scores": [score, "2.5"]}])
    (record,) = trajectories(path, TOKENIZER, context)
    assert decode(record)[1] == "b" and record.rewards[-1] == 2.5
    assert +context.skipped == Counter({"answers without a number in 'scores'": 1})
