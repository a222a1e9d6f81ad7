"""Several answers per prompt become groups with scores and pairs, whichever way their data set spells them."""

import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from shiq_jax.data.answers import find_answers, prompt_row, split_answers
from shiq_jax.data.chat import encode_prompt
from shiq_jax.data.files import rows
from shiq_jax.data.formats import preferences, prompts, trajectories
from shiq_jax.data.import_context import ImportContext
from shiq_jax.errors import UserError
from shiq_jax.replay import Buffer, pack_groups
from shiq_jax.tasks.tiny import tiny_tokenizer

HERE = Path(__file__).parent
ULTRAFEEDBACK, BINARISED, RANKED = (
    HERE / f"{name}.jsonl" for name in ("ultrafeedback", "ultrafeedback_binarized", "ranked")
)
TOKENIZER = tiny_tokenizer()
PLAIN = {"prompt": "p", "responses": ["a", "b"], "scores": [1, 2]}


def write(path, found):
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return path


def spoken(record) -> tuple[str, str]:
    """Prompt and answer of a record, as texts without special tokens."""
    parts = (record.tokens[~record.action_mask], record.tokens[record.action_mask])
    return tuple(TOKENIZER.decode(part.tolist(), skip_special_tokens=True) for part in parts)


def said(records) -> list[str]:
    return [spoken(record)[1] for record in records]


def plain_length(row, completion: str) -> float:
    return float(len(completion))


def test_every_scored_answer_of_a_prompt_is_a_record_of_its_group_and_what_cannot_be_used_is_counted():
    reading = ImportContext()
    records = list(trajectories(ULTRAFEEDBACK, TOKENIZER, reading))
    expected = {}
    for row in rows(ULTRAFEEDBACK):
        for answer in row["completions"]:
            ratings = [entry["Rating"] for entry in answer["annotations"].values()]
            numbers = [float(rating) for rating in ratings if rating != "N/A"]
            if answer["response"] and numbers:
                expected[answer["response"]] = (row["instruction"], np.mean(numbers))
    assert said(records) == list(expected)
    groups: dict[str, set] = {}
    for record, (instruction, score) in zip(records, expected.values(), strict=True):
        asked = encode_prompt(TOKENIZER, [{"role": "user", "content": instruction}])
        assert record.tokens[: len(asked)].tolist() == asked and not record.action_mask[: len(asked)].any()
        assert record.rewards[-1] == pytest.approx(score) and not record.rewards[:-1].any()
        groups.setdefault(record.group, set()).add(instruction)
        assert "completions" not in json.loads(record.prompt)
    assert sorted(map(len, groups.values())) == [1] * 6
    assert +reading.left_out == Counter(
        {"empty answers": 1, "answers without a number in 'fine-grained_score'": 1, "prompts without an answer": 1}
    )


def test_pairs_are_the_best_and_the_worst_of_the_groups(tmp_path):
    buffer, reading = Buffer.create(tmp_path / "buffer"), ImportContext()
    buffer.append(trajectories(ULTRAFEEDBACK, TOKENIZER))
    found = list(preferences(ULTRAFEEDBACK, TOKENIZER, reading))
    pairs = pack_groups(buffer, "pair")
    wanted = [buffer[number] for ((best, worst),) in pairs for number in (best, worst)]
    assert [record.tokens.tolist() for record in found] == [record.tokens.tolist() for record in wanted]
    assert [record.rewards.tolist() for record in found] == [record.rewards.tolist() for record in wanted]
    assert len(pairs) == 5 and pairs.left_out == 1
    # The prompt without answers gives no pair either.
    assert reading.left_out["prompts without two answers that differ in score or rank"] == 2
    learned = Buffer.create(tmp_path / "pairs")
    learned.append(found)
    assert list(pack_groups(learned, "pair")) == [((2 * number, 2 * number + 1),) for number in range(5)]
    ranked = Buffer.create(tmp_path / "ranked")
    ranked.append(preferences(RANKED, TOKENIZER))
    assert list(pack_groups(ranked, "pair")) == [((2 * number, 2 * number + 1),) for number in range(5)]


def test_another_score_can_be_asked_for():
    overall = ImportContext(score="overall_score")
    pairs = said(preferences(ULTRAFEEDBACK, TOKENIZER, overall))
    # This score calls the wrong answer a ten, and tells the two apart that tie in the mean of the ratings.
    assert pairs[4:6] == ["d o g", "cat"] and ["1 2", "one two"] == pairs[8:10]


def test_the_binarised_form_is_a_group_of_two_and_a_pair():
    groups, pairs = list(trajectories(BINARISED, TOKENIZER)), list(preferences(BINARISED, TOKENIZER))
    source = list(rows(BINARISED))
    assert [float(record.rewards.sum()) for record in groups] == [
        row[f"score_{side}"] for row in source for side in ("chosen", "rejected")
    ]
    assert [record.tokens.tolist() for record in groups] == [record.tokens.tolist() for record in pairs]
    assert [float(record.rewards.sum()) for record in pairs] == [1.0, 0.0] * 6
    for records in (groups, pairs):
        assert [record.chosen for record in records] == [True, False] * 6
        assert [record.score for record in records] == [float(record.rewards.sum()) for record in groups]
    assert said(pairs) == [row[side][-1]["content"] for row in source for side in ("chosen", "rejected")]
    for first, second in zip(groups[::2], groups[1::2], strict=True):
        assert first.group == second.group and spoken(first)[0] == spoken(second)[0]
    # Scores count for a pair only when they are asked for: then two that tie are no pair.
    reading = ImportContext(score="score")
    scored = list(preferences(BINARISED, TOKENIZER, reading))
    assert said(scored) == said(pairs[:4] + pairs[6:]) and {record.chosen for record in scored} == {None}


def test_ranks_make_pairs_but_no_rewards():
    records = list(preferences(RANKED, TOKENIZER))
    pairs, expected, ranks = said(records), [], []
    for row in rows(RANKED):
        ordered = sorted(row["answers"], key=lambda answer: answer["rank"])
        if ordered[0]["rank"] < ordered[-1]["rank"]:
            expected += [ordered[0]["answer"], ordered[-1]["answer"]]
            ranks += [ordered[0]["rank"], ordered[-1]["rank"]]
    assert pairs == expected and len(pairs) == 10 and [record.rank for record in records] == ranks
    # As of chosen and rejected; the ranks themselves are no rewards.
    assert [record.rewards.sum() for record in records] == [1.0, 0.0] * 5
    assert [record.rewards[:-1].any() for record in records] == [False] * 10
    with pytest.raises(UserError, match="line 1: .*ranks are no rewards, so .*--reward module:function, or .* dpo"):
        list(trajectories(RANKED, TOKENIZER))


def test_a_function_scores_what_has_no_scores():
    seen = []

    def reward(row, completion):
        seen.append(row)
        return plain_length(row, completion)

    records = list(trajectories(RANKED, TOKENIZER, ImportContext(reward=reward)))
    assert [float(record.rewards.sum()) for record in records] == [float(len(text)) for text in said(records)]
    assert [json.loads(record.prompt) for record in records] == seen and "answers" not in seen[0]
    # What the data say themselves comes first.
    scored = list(trajectories(ULTRAFEEDBACK, TOKENIZER, ImportContext(reward=reward)))
    assert scored == list(trajectories(ULTRAFEEDBACK, TOKENIZER))


def test_conversations_are_scored_by_the_text_of_the_answer(tmp_path):
    bare = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in rows(BINARISED)]
    path = write(tmp_path / "bare.jsonl", bare)
    records = list(trajectories(path, TOKENIZER, ImportContext(reward=plain_length)))
    assert [float(record.rewards.sum()) for record in records] == [float(len(text)) for text in said(records)]
    with pytest.raises(
        UserError, match="line 1: the row has no scores: add score_chosen and score_rejected, .*--reward"
    ):
        list(trajectories(path, TOKENIZER))
    assert said(preferences(path, TOKENIZER)) == said(records)


def spelled_as_lists(row):
    answers = [answer for answer in row["completions"]]
    scores = [split_answers(row).scores[number] for number in range(len(answers))]
    kept = {name: row[name] for name in ("source", "instruction", "models", "correct_answers", "incorrect_answers")}
    return kept | {"generations": [answer["response"] for answer in answers], "ratings": scores}


def spelled_as_texts(row):
    sides = {f"{side}_response": row[side][-1]["content"] for side in ("chosen", "rejected")}
    scores = {f"{side}_avg_rating": row[f"score_{side}"] for side in ("chosen", "rejected")}
    return {"instruction": row["prompt"]} | sides | scores


def spelled_with_dashes(row):
    scores = {f"{side}-rating": row[f"score_{side}"] for side in ("chosen", "rejected")}
    return {name: row[name] for name in ("prompt", "chosen", "rejected")} | scores


@pytest.mark.parametrize(
    "source, spell",
    [(ULTRAFEEDBACK, spelled_as_lists), (BINARISED, spelled_as_texts), (BINARISED, spelled_with_dashes)],
)
def test_other_spellings_hold_the_same(source, spell, tmp_path):
    other = write(tmp_path / "other.jsonl", [spell(row) for row in rows(source)])
    for read in (trajectories, preferences):
        mine, theirs = list(read(source, TOKENIZER)), list(read(other, TOKENIZER))
        for one, two in zip(mine, theirs, strict=True):
            assert one.tokens.tolist() == two.tokens.tolist() and one.rewards.tolist() == two.rewards.tolist()


def test_columns_hold_the_same_as_lines(tmp_path):
    import datasets

    for source in (ULTRAFEEDBACK, BINARISED, RANKED):
        # A table has every field in every row; what a row does not have is null there.
        dataset = datasets.Dataset.from_list([json.loads(line) for line in source.read_text().splitlines()])
        dataset.to_parquet(tmp_path / "table.parquet")
        assert said(preferences(tmp_path / "table.parquet", TOKENIZER)) == said(preferences(source, TOKENIZER))
        if source is not RANKED:
            ours, theirs = trajectories(tmp_path / "table.parquet", TOKENIZER), trajectories(source, TOKENIZER)
            for one, two in zip(ours, theirs, strict=True):
                assert one.tokens.tolist() == two.tokens.tolist() and one.rewards.tolist() == two.rewards.tolist()


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ([PLAIN | {"scores": [1]}], "line 1: field 'scores' has 1 entries for 2 answers"),
        ([PLAIN | {"scores": [1, math.inf]}], "line 1: field 'scores' holds inf: expected finite numbers"),
        ([PLAIN | {"responses": ["a", {"response": "b"}]}], "line 1: field 'responses' mixes texts with objects"),
        ([PLAIN | {"responses": [{"score": 1}, {"response": "b"}]}], "line 1: field 'responses', answer 1 has no text"),
        ([{name: PLAIN[name] for name in ("responses", "scores")}], "line 1: field 'prompt' is missing"),
        ([{name: PLAIN[name] for name in ("prompt", "responses")}], "line 1: the row has no scores: .*--reward"),
        ([PLAIN, {"prompt": "p", "completions": [{"text": "a", "overall_score": 1}]}], "line 2: .*'scores', .*--score"),
        ([PLAIN, {"prompt": "p", "completion": "a", "reward": 1}], "line 2: .*one scale"),
    ],
)  # fmt: skip
def test_answers_that_do_not_fit_are_refused_with_their_place(found, message, tmp_path):
    with pytest.raises(UserError, match=message):
        list(trajectories(write(tmp_path / "data.jsonl", found), TOKENIZER))


def test_ranks_must_be_numbers(tmp_path):
    path = write(tmp_path / "data.jsonl", [{"prompt": "p", "responses": ["a", "b"], "ranks": [1, None]}])
    with pytest.raises(UserError, match="line 1: the ranks of the answers are"):
        list(preferences(path, TOKENIZER))


def test_what_is_not_accepted_is_out_and_the_next_best_takes_its_place():
    short = ImportContext(accept=lambda record: spoken(record)[1] != "An apple.")
    assert "An apple." not in said(trajectories(ULTRAFEEDBACK, TOKENIZER, short))
    assert said(preferences(ULTRAFEEDBACK, TOKENIZER, short))[:2] == ["A pear, or a plum.", "A carrot."]
    pairs = said(preferences(BINARISED, TOKENIZER, short))
    assert len(pairs) == 10 and "A carrot." not in pairs


def test_the_prompts_are_those_that_the_answers_had():
    for source in (ULTRAFEEDBACK, BINARISED):
        asked = [row["prompt"] for row in prompts(source)]
        assert all(message["role"] == "user" for (message,) in asked)
        trained = {json.dumps(json.loads(record.prompt)["prompt"]) for record in trajectories(source, TOKENIZER)}
        assert trained <= {json.dumps(prompt) for prompt in asked}
    assert prompt_row({"prompt": "p", "answers": ["a"]}) == {"prompt": "p", "answers": ["a"]}
    for row in ({"prompt": "p", "answer": "a"}, {"prompt": "p", "chosen": "a"}):
        assert not find_answers(row).present


@pytest.mark.parametrize("nothing", [math.nan, None, "N/A", "", True])
def test_what_is_no_number_is_no_score(nothing, tmp_path):
    reading = ImportContext()
    path = write(tmp_path / "data.jsonl", [PLAIN | {"scores": [nothing, "2.5"]}])
    (record,) = trajectories(path, TOKENIZER, reading)
    assert spoken(record)[1] == "b" and record.rewards[-1] == 2.5
    assert +reading.left_out == Counter({"answers without a number in 'scores'": 1})
