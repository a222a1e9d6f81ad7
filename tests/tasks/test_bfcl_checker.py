"""The leaderboard's checker as a reward: agreement with the official evaluation, without executing model output."""

import json
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shiq_jax.errors import UserError
from shiq_jax.tasks import bfcl, fetch
from shiq_jax.tasks.bfcl_checker import bfcl_reward, constant_arithmetic, load_official

# Verdicts of the leaderboard's own evaluation, written by `tests/goldens/make_bfcl_verdicts.py`.
VERDICTS = Path(__file__).parent.parent / "goldens" / "bfcl_verdicts.jsonl"
# The leaderboard evaluates these with `eval` and accepts the value; here they are rejected.
DIFFERENCES = {"abs(-9) + 1", "len('123456789') + 1", "9 + True", "5 << 1"}
NUMBERS = st.integers(-50, 50).map(str)
EXPRESSIONS = st.recursive(
    NUMBERS,
    lambda inner: st.tuples(inner, st.sampled_from("+-*"), inner).map(lambda part: f"({' '.join(part)})"),
    max_leaves=8,
)


@given(EXPRESSIONS)
@settings(deadline=None)
def test_constant_arithmetic_matches_eval(expression):
    assert constant_arithmetic(expression) == eval(expression)


@pytest.mark.parametrize(
    ("expression", "value"), [("7 // 2", 3), ("7 % 4", 3), ("1 / 4", 0.25), ("2 ** 10", 1024), ("'a' + 'b'", "ab")]
)
def test_other_operators(expression, value):
    assert constant_arithmetic(expression) == value


@pytest.mark.parametrize(
    "expression",
    [
        "__import__('os').getcwd() + ''",
        "x + 1",
        "9 ** 9 ** 9",
        "(9 ** 64) ** 64 ** 2",
        "'a' * 1000000000",
        "'%1000000000d' % 1",
        "1 << 1000000000",
        "[1] + [2]",
        "1 + 2j",
        "1 + " * 1000 + "1",
    ],
)
def test_other_expressions_are_rejected(expression):
    with pytest.raises(ValueError):
        constant_arithmetic(expression)


def test_directory_without_the_package_is_rejected(tmp_path):
    with pytest.raises(UserError, match="does not hold the package bfcl_eval"):
        load_official(tmp_path)
    utilities = tmp_path / "bfcl_eval" / "model_handler" / "utils.py"
    utilities.parent.mkdir(parents=True)
    utilities.write_text("def ast_parse(): pass\n")
    with pytest.raises(UserError, match="cannot be imported"):
        load_official(tmp_path)
    assert not [name for name in sys.modules if name.startswith("bfcl_eval")]


@pytest.fixture(scope="module")
def rows():
    return bfcl.load(fetch.bfcl())


@pytest.mark.slow
def test_every_ground_truth_scores_one(rows):
    assert [row["id"] for row in rows if bfcl_reward(row, row["target"]) != 1.0] == []
    assert not [name for name in sys.modules if name.split(".")[0] == "bfcl_eval"]


@pytest.mark.slow
def test_rewards_match_official_evaluation(rows):
    by_id = {row["id"]: row for row in rows}
    lines = [json.loads(line) for line in VERDICTS.read_text(encoding="utf-8").splitlines()]
    verdicts = Counter(line["valid"] for line in lines)
    assert verdicts[True] >= 300 and verdicts[False] >= 600 and verdicts.total() == len(lines)
    # Both answers derived from the ground truth and answers sampled from a model, of all categories.
    sampled = Counter(line["valid"] for line in lines if line["source"] == "sampled")
    assert min(sampled[True], sampled[False], verdicts[True] - sampled[True], verdicts[False] - sampled[False]) > 25
    assert len({(by_id[line["id"]]["category"], line["valid"]) for line in lines}) == 2 * len(bfcl.CATEGORIES)
    different = [line for line in lines if bfcl_reward(by_id[line["id"]], line["text"]) != line["valid"]]
    assert {line["source"] for line in different} == {f"expression {text}" for text in DIFFERENCES}, different
    assert all(line["valid"] for line in different) and len(different) == len(DIFFERENCES)


@pytest.mark.slow
def test_mutated_answers_score_zero(rows):
    for row in rows[::7]:
        name = next(iter(row["answers"][0]))
        for wrong in (
            "",
            "[]",
            "I cannot do that.",
            row["target"].replace(name, name + "_other"),
            row["target"].replace("(", "(no_such_parameter=1, ", 1),
            row["target"][:-1] + ", " + row["target"][1:],
            row["target"][: len(row["target"]) // 2],
        ):
            assert bfcl_reward(row, wrong) == 0.0, (row["id"], wrong)


@pytest.mark.slow
def test_values_matter_and_order_of_parallel_calls_does_not(rows):
    row = next(row for row in rows if row["id"] == "simple_python_0")
    call = "calculate_triangle_area({})"
    assert bfcl_reward(row, f"[{call.format('base=10, height=5')}]") == 1.0
    assert bfcl_reward(row, f"[{call.format('height=5, base=2 * 5')}]") == 1.0
    assert bfcl_reward(row, f"```[{call.format('base=10, height=5')}]```") == 1.0
    assert bfcl_reward(row, f"[{call.format('base=10, height=6')}]") == 0.0
    assert bfcl_reward(row, f"""[{call.format("base='10', height=5")}]""") == 0.0
    assert bfcl_reward(row, f"[{call.format('base=10')}]") == 0.0
    row = next(row for row in rows if row["id"] == "parallel_0")
    first, second = ('spotify.play(artist="Taylor Swift", duration=20)', 'spotify.play(artist="Maroon 5", duration=15)')
    assert bfcl_reward(row, f"[{first}, {second}]") == bfcl_reward(row, f"[{second}, {first}]") == 1.0
    assert bfcl_reward(row, f"[{first}, {first}]") == bfcl_reward(row, f"[{first}]") == 0.0


@pytest.mark.slow
def test_model_output_is_not_executed(rows, tmp_path):
    row = next(row for row in rows if row["id"] == "simple_python_0")
    file = tmp_path / "executed"
    attack = f"[calculate_triangle_area(base=open({str(file)!r}, 'w').write('x') + 9, height=5)]"
    assert bfcl_reward(row, attack) == 0.0
    assert not file.exists()
    for text in (
        "(" * 10000,
        "[f(a=" + "-" * 50000 + "1)]",
        "[f(a=9**9**9**9)]",
        "\x00",
        "[f(**{'a': 1})]",
        "[" * 300 + "]" * 300,
    ):
        assert bfcl_reward(row, text) == 0.0
