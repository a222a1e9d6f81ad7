"""Rows know whether their goal is met, and survive a file."""

import json

import pytest

from benchmarks import rows
from benchmarks.rows import Row

ROWS = [
    Row("ratio", 2.0, "x", 1.5),
    Row("smaller", 0.7, "x", 0.65, at_most=True, note="too much"),
    Row("not_there", None, "x", 5.0),
    Row("free", 3.0, "tokens/s"),
]


def test_a_goal_is_a_bound_from_below_or_from_above():
    assert [row.met for row in ROWS] == [True, False, None, None]
    assert Row("memory", 0.65, "x", 0.65, at_most=True).met and Row("ratio", 1.5, "x", 1.5).met


def test_rows_come_back_from_their_file(tmp_path):
    rows.write_json(path := tmp_path / "deep" / "rows.json", ROWS, details={"a": 1})
    written = json.loads(path.read_text())
    assert [entry["met"] for entry in written["rows"]] == [True, False, None, None]
    assert written["device"] and written["details"] == {"a": 1}
    assert rows.read(tmp_path / "none.json") == {}
    assert list(rows.read(path).values()) == ROWS


def test_the_table_of_a_page_is_replaced_and_nothing_else(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# Title\n\n<!-- table -->\nold\n<!-- end of table -->\n\nwhy\n")
    for _ in range(2):
        rows.replace_table(page, rows.markdown(ROWS))
    text = page.read_text()
    assert text.startswith("# Title\n\n<!-- table -->\n| row") and text.endswith("<!-- end of table -->\n\nwhy\n")
    assert "old" not in text and text.count("`not_there` | not measured yet | at least 5") == 1


def test_a_quick_command_writes_its_rows_but_not_into_the_results(tmp_path, monkeypatch, capsys):
    measured = []
    monkeypatch.setattr(rows.jax.config, "update", lambda *_: None)
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "0")

    def measure(quick):
        measured.append(quick)
        return ROWS, {"a": 1}

    path = tmp_path / "rows.json"
    monkeypatch.setattr("sys.argv", ["benchmark", "--quick", "--json", str(path)])
    rows.command("title", None, measure)
    assert measured == [True] and list(rows.read(path).values()) == ROWS and "title" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["benchmark", "--quick", "--json", str(rows.RESULTS / "deep" / "rows.json")])
    with pytest.raises(SystemExit, match="quick numbers are not results"):
        rows.command("title", None, measure)
    assert measured == [True] and not (rows.RESULTS / "deep").exists()
    rows.prepare(False, rows.RESULTS / "rows.json")
    rows.prepare(True, None)
