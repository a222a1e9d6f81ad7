"""Rows of the leaderboard and their split into training and held-out rows."""

import ast
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shiq_jax.errors import UserError
from shiq_jax.tasks import bfcl, fetch

AREA = {
    "name": "area.of",
    "description": "Area.",
    "parameters": {
        "type": "dict",
        "properties": {"base": {"type": "integer"}, "unit": {"type": "string"}, "flag": {"type": "boolean"}},
        "required": ["base", "flag"],
    },
}
FIND = {
    "name": "find",
    "description": "Find.",
    "parameters": {
        "type": "dict",
        "properties": {
            "where": {"type": "dict"},
            "all": {"type": "array", "items": {"type": "dict"}},
            "name": {"type": "string"},
        },
        "required": ["where", "all", "name"],
    },
}


def _row(question, *names):
    return {
        "id": question,
        "prompt": [{"role": "system", "content": "Functions"}, {"role": "user", "content": question}],
        "functions": [{"name": name} for name in names],
    }


def _questions_and_functions(rows):
    questions = {" ".join(row["prompt"][1]["content"].lower().split()) for row in rows}
    return questions | {function["name"] for row in rows for function in row["functions"]}


@given(
    st.lists(
        st.tuples(st.integers(0, 12), st.lists(st.integers(0, 25), min_size=1, max_size=2)), min_size=4, max_size=40
    ),
    st.integers(0, 2**31),
    st.floats(0.05, 0.6),
)
@settings(max_examples=60, deadline=None)
def test_splits_share_no_question_and_no_function(row_specs, seed, fraction):
    rows = [_row(f"Question  {question}", *(f"f{name}" for name in names)) for question, names in row_specs]
    train, held_out = bfcl.split_held_out(rows, seed=seed, held_out=fraction)
    assert not _questions_and_functions(train) & _questions_and_functions(held_out)
    assert sorted(map(id, train + held_out)) == sorted(map(id, rows))
    assert len(held_out) <= round(fraction * len(rows))
    assert bfcl.split_held_out(rows, seed=seed, held_out=fraction) == (train, held_out)


def test_questions_are_compared_without_case_and_white_space():
    rows = [_row("What  is it?", "f"), _row("what is it?", "g"), _row("Else?", "h"), _row("More?", "h")]
    for seed in range(8):
        train, held_out = bfcl.split_held_out(rows, seed=seed, held_out=0.5)
        assert {tuple(sorted(row["id"] for row in side)) for side in (train, held_out)} == {
            ("What  is it?", "what is it?"),
            ("Else?", "More?"),
        }


def test_held_out_size_is_exact_for_unrelated_rows():
    rows = [_row(str(index), f"f{index}") for index in range(50)]
    splits = [bfcl.split_held_out(rows, seed=seed, held_out=0.3) for seed in (0, 1)]
    assert [len(held_out) for _, held_out in splits] == [15, 15]
    assert splits[0] != splits[1]


@pytest.mark.parametrize("fraction", [0.0, 1.0, -1])
def test_fraction_outside_the_unit_interval_is_rejected(fraction):
    with pytest.raises(ValueError, match="held_out"):
        bfcl.split_held_out([_row("a", "f")], seed=0, held_out=fraction)


@pytest.fixture
def leaderboard(tmp_path):
    """A directory with the leaderboard's layout and two questions of one category."""
    data = tmp_path / "bfcl_eval" / "data"
    (data / "possible_answer").mkdir(parents=True)
    questions = [("parallel_0", "Areas?", [AREA]), ("parallel_1", "Find é!", [AREA, FIND])]
    truths = [
        ("parallel_0", [{"area.of": {"base": [3, 4], "unit": ["cm", ""], "flag": [True]}}] * 2),
        (
            "parallel_1",
            [{"find": {"where": [{"x": [1, 2], "y": ["", 3]}], "all": [[{"k": ["v"]}]], "name": ['say "é"\n']}}],
        ),
    ]
    (data / "BFCL_v4_parallel.json").write_text(
        "\n".join(
            json.dumps({"id": name, "question": [[{"role": "user", "content": text}]], "function": functions})
            for name, text, functions in questions
        )
    )
    (data / "possible_answer" / "BFCL_v4_parallel.json").write_text(
        "\n".join(json.dumps({"id": name, "ground_truth": truth}) for name, truth in truths)
    )
    return tmp_path


def test_rows_have_functions_and_the_shortest_accepted_answer(leaderboard):
    areas, find = bfcl.load(leaderboard, ["parallel"])
    assert areas["target"] == "[area.of(base=3, flag=True), area.of(base=3, flag=True)]"
    assert find["target"] == '[find(where={"x": 1}, all=[{"k": "v"}], name="say \\"é\\"\\n")]'
    call = ast.parse(find["target"], mode="eval").body.elts[0]
    assert {k.arg: ast.literal_eval(k.value) for k in call.keywords} == {
        "where": {"x": 1},
        "all": [{"k": "v"}],
        "name": 'say "é"\n',
    }
    system, user = find["prompt"]
    assert user == {"role": "user", "content": "Find é!"}
    assert json.loads(system["content"].split("Functions:\n")[1]) == [AREA, FIND] == find["functions"]
    assert json.loads(json.dumps(find)) == find


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=8,
    )
)
def test_literal_evaluates_to_the_value(value):
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return
    assert ast.literal_eval(bfcl.literal(value)) == value


def test_errors_name_the_damaged_file(leaderboard, tmp_path):
    with pytest.raises(UserError, match="the category 'java' is unknown"):
        bfcl.load(leaderboard, ["java"])
    with pytest.raises(UserError, match="shiq_jax.tasks.fetch"):
        bfcl.load(leaderboard, ["multiple"])
    answers = leaderboard / "bfcl_eval" / "data" / "possible_answer" / "BFCL_v4_parallel.json"
    answers.write_text(answers.read_text().splitlines()[0])
    with pytest.raises(UserError, match="has the question parallel_1"):
        bfcl.load(leaderboard, ["parallel"])
    answers.write_text('{"id": 1')
    with pytest.raises(UserError, match="line 1 is not JSON"):
        bfcl.load(leaderboard, ["parallel"])


@pytest.mark.slow
def test_real_leaderboard():
    rows = bfcl.load(fetch.bfcl())
    counts = {category: sum(row["category"] == category for row in rows) for category in bfcl.CATEGORIES}
    assert counts == {"simple_python": 400, "multiple": 200, "parallel": 200, "parallel_multiple": 200}
    for seed in range(3):
        train, held_out = bfcl.split_held_out(rows, seed=seed)
        assert not _questions_and_functions(train) & _questions_and_functions(held_out)
        assert (len(train), len(held_out)) == (800, 200)
        # The held-out side has rows of every category.
        assert {row["category"] for row in held_out} == set(bfcl.CATEGORIES)
