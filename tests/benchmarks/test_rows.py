"""Benchmark rows: goals, JSON files, Markdown tables and quick runs."""

import json

import pytest

from benchmarks import rows
from benchmarks.rows import Row

ROWS = [
    Row("ratio", 2.0, "x", 1.5),
    Row("upper_bound", 0.7, "x", 0.65, at_most=True, note="too much"),
    Row("unmeasured", None, "x", 5.0),
    Row("no_goal", 3.0, "tokens/s"),
]


def test_goal_is_a_lower_or_an_upper_bound():
    assert [row.met for row in ROWS] == [True, False, None, None]
    assert Row("memory", 0.65, "x", 0.65, at_most=True).met and Row("ratio", 1.5, "x", 1.5).met


def test_json_round_trip(tmp_path):
    rows.write_json(path := tmp_path / "deep" / "rows.json", ROWS, details={"a": 1})
    content = json.loads(path.read_text())
    assert [entry["met"] for entry in content["rows"]] == [True, False, None, None]
    assert content["device"] and content["details"] == {"a": 1}
    assert rows.read_json(tmp_path / "missing.json") == {}
    assert list(rows.read_json(path).values()) == ROWS


def test_replace_table_keeps_the_rest_of_the_page(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# Title\n\n<!-- table -->\nold\n<!-- end of table -->\n\nwhy\n")
    for _ in range(2):
        rows.replace_table(page, rows.markdown(ROWS))
    text = page.read_text()
    assert text.startswith("# Title\n\n<!-- table -->\n| row") and text.endswith("<!-- end of table -->\n\nwhy\n")
    assert "old" not in text and text.count("`unmeasured` | not measured yet | at least 5") == 1


def test_quick_run_writes_rows_but_not_to_docs_results(tmp_path, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(rows.jax.config, "update", lambda *_: None)
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "0")

    def measure(quick):
        calls.append(quick)
        return ROWS, {"a": 1}

    path = tmp_path / "rows.json"
    monkeypatch.setattr("sys.argv", ["benchmark", "--quick", "--json", str(path)])
    rows.run_benchmark("title", None, measure)
    assert calls == [True] and list(rows.read_json(path).values()) == ROWS and "title" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["benchmark", "--quick", "--json", str(rows.RESULTS / "deep" / "rows.json")])
    with pytest.raises(SystemExit, match="quick numbers are not results"):
        rows.run_benchmark("title", None, measure)
    assert calls == [True] and not (rows.RESULTS / "deep").exists()
    rows.prepare(False, rows.RESULTS / "rows.json")
    rows.prepare(True, None)
