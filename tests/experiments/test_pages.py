"""Results pages match the pages rendered from the committed JSON files."""

import json
from pathlib import Path

import pytest

from benchmarks import privacy, rows
from experiments import bfcl_page, dp_alignment_page, dp_pretraining_page, frontier_page, synthetic_page

RESULTS = Path(__file__).parents[2] / "docs" / "results"


def read(name):
    return json.loads((RESULTS / name).read_text())


PAGES = {
    "bfcl.md": lambda: bfcl_page.render(bfcl_page.load(RESULTS, "small"), "small", "bfcl"),
    "dp_alignment.md": lambda: dp_alignment_page.render(dp_alignment_page.Results(RESULTS)),
    "dp_pretraining.md": lambda: dp_pretraining_page.render(read("dp_pretraining.json")),
    "frontier.md": lambda: frontier_page.render(read("frontier.json")),
    "synthetic.md": lambda: synthetic_page.render(read("synthetic.json")),
}


@pytest.mark.parametrize("name", PAGES)
def test_page_matches_its_results(name):
    # A boolean avoids a long diff of two pages in the failure message.
    same = PAGES[name]() == (RESULTS / name).read_text()
    assert same, f"{name} does not match its results: render it again"


def test_benchmark_tables_match_their_rows():
    details = read("privacy.json")["details"]
    page = (RESULTS / "privacy.md").read_text()
    assert rows.markdown(privacy.table(details)) in page and privacy.settings_table(details) in page
    committed = rows.read_json(RESULTS / "throughput.json")
    assert rows.markdown(list(committed.values())) in (RESULTS / "throughput.md").read_text()
