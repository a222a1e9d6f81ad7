"""Every page of docs/results that is drawn from kept numbers is what its command makes of them."""

import json
from pathlib import Path

import pytest

from benchmarks import privacy, rows
from experiments import bfcl_page, dp_alignment_page, dp_pretraining_page, frontier_page, synthetic_page

RESULTS = Path(__file__).parents[2] / "docs" / "results"


def kept(name):
    return json.loads((RESULTS / name).read_text())


PAGES = {
    "bfcl.md": lambda: bfcl_page.render(bfcl_page.kept(RESULTS, "small"), "small", "bfcl"),
    "dp_alignment.md": lambda: dp_alignment_page.render(dp_alignment_page.Results(RESULTS)),
    "dp_pretraining.md": lambda: dp_pretraining_page.text(kept("dp_pretraining.json")),
    "frontier.md": lambda: frontier_page.render(kept("frontier.json")),
    "synthetic.md": lambda: synthetic_page.render(kept("synthetic.json")),
}


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_that_of_its_kept_numbers(name):
    # One assertion on a flag: a difference of two pages would be printed at length.
    same = PAGES[name]() == (RESULTS / name).read_text()
    assert same, f"{name} is not what its numbers give: draw it again"


def test_tables_of_benchmarks_are_those_of_their_rows():
    details = kept("privacy.json")["details"]
    page = (RESULTS / "privacy.md").read_text()
    assert rows.markdown(privacy.table(details)) in page and privacy.every_setting(details) in page
    found = rows.read(RESULTS / "throughput.json")
    assert rows.markdown(list(found.values())) in (RESULTS / "throughput.md").read_text()
