"""The leaderboard's checker as a reward: right answers score one, wrong ones zero, and no text is executed."""

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

# What the leaderboard's own evaluation said of many answers; `make_bfcl_verdicts.py` beside it wrote it.
VERDICTS = Path(__file__).parent.parent / "goldens" / "bfcl_verdicts.jsonl"
# The leaderboard runs these as Python and finds the right value; here they are no arithmetic, and wrong.
DEPARTURES = {"abs(-9) + 1", "len('123456789') + 1", "9 + True", "5 << 1"}
NUMBERS = st.integers(-50, 50).map(str)
EXPRESSIONS = st.recursive(
    NUMBERS,
    lambda inner: st.tuples(inner, st.sampled_from("+-*"), inner).map(lambda part: f"({' '.join(part)})"),
    max_leaves=8,
)


@given(EXPRESSIONS)
@settings(deadline=None)
def test_arithmetic_on_constants_is_pythons(expression):
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
def test_everything_else_is_no_arithmetic(expression):
    with pytest.raises(ValueError):
        constant_arithmetic(expression)


def test_a_directory_without_the_package_is_refused(tmp_path):
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
def test_rewards_are_the_verdicts_of_the_official_evaluation(rows):
    by_id = {row["id"]: row for row in rows}
    lines = [json.loads(line) for line in VERDICTS.read_text(encoding="utf-8").splitlines()]
    right = Counter(line["valid"] for line in lines)
    assert right[True] >= 300 and right[False] >= 600 and right.total() == len(lines)
    # Written for the purpose out of the ground truth, and drawn from a language model; all categories.
    sampled = Counter(line["valid"] for line in lines if line["source"] == "sampled")
    assert min(sampled[True], sampled[False], right[True] - sampled[True], right[False] - sampled[False]) > 25
    assert len({(by_id[line["id"]]["category"], line["valid"]) for line in lines}) == 2 * len(bfcl.CATEGORIES)
    unlike = [line for line in lines if bfcl_reward(by_id[line["id"]], line["text"]) != line["valid"]]
    assert {line["source"] for line in unlike} == {f"expression {each}" for each in DEPARTURES}, unlike
    assert all(line["valid"] for line in unlike) and len(unlike) == len(DEPARTURES)


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
def test_values_count_and_the_order_of_parallel_calls_does_not(rows):
    row = next(row for row in rows if row["id"] == "simple_python_0")
    call = "calculate_triangle_area({})"
    assert bfcl_reward(row, f"[{call.format('base=10, height=5')}]") == 1.0
    assert bfcl_reward(row, f"[{call.format('height=5, base=2 * 5')}]") == 1.0
    assert bfcl_reward(row, f"```[{call.format('base=10, height=5')}]```") == 1.0
    assert bfcl_reward(row, f"[{call.format('base=10, height=6')}]") == 0.0
    assert bfcl_reward(row, f"""[{call.format("base='10', height=5")}]""") == 0.0
    assert bfcl_reward(row, f"[{call.format('base=10')}]") == 0.0
    row = next(row for row in rows if row["id"] == "parallel_0")
    one, other = ('spotify.play(artist="Taylor Swift", duration=20)', 'spotify.play(artist="Maroon 5", duration=15)')
    assert bfcl_reward(row, f"[{one}, {other}]") == bfcl_reward(row, f"[{other}, {one}]") == 1.0
    assert bfcl_reward(row, f"[{one}, {one}]") == bfcl_reward(row, f"[{one}]") == 0.0


@pytest.mark.slow
def test_text_of_a_model_is_not_executed(rows, tmp_path):
    row = next(row for row in rows if row["id"] == "simple_python_0")
    mark = tmp_path / "executed"
    attack = f"[calculate_triangle_area(base=open({str(mark)!r}, 'w').write('x') + 9, height=5)]"
    assert bfcl_reward(row, attack) == 0.0
    assert not mark.exists()
    for monster in (
        "(" * 10000,
        "[f(a=" + "-" * 50000 + "1)]",
        "[f(a=9**9**9**9)]",
        "\x00",
        "[f(**{'a': 1})]",
        "[" * 300 + "]" * 300,
    ):
        assert bfcl_reward(row, monster) == 0.0
