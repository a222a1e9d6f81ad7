"""Benchmark results: rows with goals, written as a text table, JSON and Markdown."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import tyro

from shiq_jax.runs import report

RESULTS = Path(__file__).parents[1] / "docs" / "results"


class Row(NamedTuple):
    """One measured number.

    Attributes:
        name: identifier of the row in tables and JSON.
        value: the number; None if it was not measured.
        unit: unit of the value, such as "x" for a ratio.
        goal: target value; None if there is no target.
        at_most: the goal is an upper bound instead of a lower bound.
        note: short description of how the value was obtained.
    """

    name: str
    value: float | None
    unit: str
    goal: float | None = None
    at_most: bool = False
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the goal is reached; None without a value or a goal."""
        if self.value is None or self.goal is None:
            return None
        return self.value <= self.goal if self.at_most else self.value >= self.goal

    def cells(self) -> tuple[str, str, str, str, str]:
        """Name, value, goal, whether it is met, and note, as text."""
        value = "not measured yet" if self.value is None else f"{self.value:.3g} {self.unit}"
        goal = "" if self.goal is None else f"{'at most' if self.at_most else 'at least'} {self.goal:g}"
        return self.name, value, goal, {True: "yes", False: "no", None: ""}[self.met], self.note


@dataclasses.dataclass(frozen=True)
class Options:
    """Benchmark options."""

    json: Path
    """Output file for the rows."""
    quick: bool = False
    """Use small sizes to test the script; the numbers are meaningless."""


def run_benchmark(title: str, description: str | None, measure: Callable[[bool], tuple[list[Row], dict]]) -> None:
    """Parse the command line of a benchmark without additional options, measure, write JSON and print the table.

    Args:
        title: printed above the table.
        description: shown by `--help`.
        measure: takes `quick`; returns the rows and their raw measurements.
    """
    options = tyro.cli(Options, description=description)
    prepare(options.quick, options.json)
    rows, details = measure(options.quick)
    write_json(options.json, rows, details=details)
    print_table(title, rows)


def prepare(quick: bool, *files: Path | None) -> None:
    """Configure a quick run before anything is measured.

    Turn off compiler optimization in this process and its children. Exit if an output file is in docs/results, because
    quick numbers are not results.
    """
    if not quick:
        return
    for file in files:
        if file is not None and file.resolve().is_relative_to(RESULTS):
            sys.exit(f"{file} is in {RESULTS}, but quick numbers are not results: choose another directory")
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    jax.config.update("jax_disable_most_optimizations", True)


def write_json(path: Path, rows: Sequence[Row], **extra: Any) -> None:
    """Write `{"device", "rows": [{"name", "value", "unit", "goal", "at_most", "note", "met"}], **extra}`."""
    entries = [row._asdict() | {"met": row.met} for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"device": report.machine(), "rows": entries, **extra}, indent=1) + "\n")


def read_json(path: Path) -> dict[str, Row]:
    """Rows of a file by name; empty if the file does not exist."""
    entries = json.loads(path.read_text())["rows"] if path.exists() else []
    return {entry["name"]: Row(**{field: entry[field] for field in Row._fields}) for entry in entries}


def print_table(title: str, rows: Sequence[Row]) -> None:
    """Print the rows as an aligned text table."""
    lines = [("row", "value", "goal", "met", "note"), *(row.cells() for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(4)]
    print(title)
    for line in lines:
        print("  ".join([*(text.ljust(width) for text, width in zip(line, widths)), line[4]]).rstrip())


def markdown(rows: Sequence[Row]) -> str:
    """Format the rows as a Markdown table."""
    lines = ["| row | value | goal | met | |", "|---|---|---|---|---|"]
    lines += ["| " + " | ".join((f"`{name}`", *cells)) + " |" for name, *cells in (row.cells() for row in rows)]
    return "\n".join(lines)


def replace_table(page: Path, table: str) -> None:
    """Replace the table between the two markers of a page."""
    begin, end = "<!-- table -->", "<!-- end of table -->"
    before, _, rest = page.read_text().partition(begin)
    _, _, after = rest.partition(end)
    page.write_text(f"{before}{begin}\n{table}\n{end}{after}")
