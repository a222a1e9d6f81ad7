"""What a benchmark found: rows with their goals, as a table, as JSON, and as Markdown."""

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
    """One number.

    Attributes:
        name: what the row is called everywhere.
        value: the number; None where it was not measured.
        unit: of the number, such as "x" for a ratio.
        goal: what it should reach; None where there is no goal.
        at_most: the goal is an upper bound, not a lower one.
        note: how the number came about, in a few words.
    """

    name: str
    value: float | None
    unit: str
    goal: float | None = None
    at_most: bool = False
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the goal is reached; None where there is nothing to compare."""
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
    """What to measure."""

    json: Path
    """Where the rows go."""
    quick: bool = False
    """Small sizes that prove that the script works; the numbers mean nothing."""


def command(title: str, about: str | None, measure: Callable[[bool], tuple[list[Row], dict]]) -> None:
    """A benchmark without options of its own: parse the command line, measure, write, print.

    Args:
        title: printed above the table.
        about: shown by `--help`.
        measure: takes `quick`; returns the rows and the details behind them.
    """
    options = tyro.cli(Options, description=about)
    prepare(options.quick, options.json)
    found, details = measure(options.quick)
    write_json(options.json, found, details=details)
    show(title, found)


def prepare(quick: bool, *files: Path | None) -> None:
    """Called before anything is measured.

    In quick form programs compile without optimisation, here and in processes that are started from here, and quick
    numbers stay out of docs/results: SystemExit with one sentence when one of the files is there.
    """
    if not quick:
        return
    for file in files:
        if file is not None and file.resolve().is_relative_to(RESULTS):
            sys.exit(f"quick numbers are not results: {file} is in {RESULTS}, choose a file elsewhere")
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    jax.config.update("jax_disable_most_optimizations", True)


def write_json(path: Path, rows: Sequence[Row], **more: Any) -> None:
    """`{"device", "rows": [{"name", "value", "unit", "goal", "at_most", "note", "met"}], ...}`."""
    entries = [row._asdict() | {"met": row.met} for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"device": report.machine(), "rows": entries, **more}, indent=1) + "\n")


def read(path: Path) -> dict[str, Row]:
    """The rows of a file by name; none when it is not there."""
    entries = json.loads(path.read_text())["rows"] if path.exists() else []
    return {entry["name"]: Row(**{field: entry[field] for field in Row._fields}) for entry in entries}


def show(title: str, rows: Sequence[Row], printing: Callable[[str], None] = print) -> None:
    """The rows as a table of plain text."""
    cells = [("row", "value", "goal", "met", "note"), *(row.cells() for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(4)]
    printing(title)
    for line in cells:
        printing("  ".join([*(text.ljust(width) for text, width in zip(line, widths)), line[4]]).rstrip())


def markdown(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    lines = ["| row | value | goal | met | |", "|---|---|---|---|---|"]
    lines += ["| " + " | ".join((f"`{name}`", *others)) + " |" for name, *others in (row.cells() for row in rows)]
    return "\n".join(lines)


def replace_table(page: Path, table: str) -> None:
    """Puts a table between the page's two marks."""
    begin, end = "<!-- table -->", "<!-- end of table -->"
    before, _, rest = page.read_text().partition(begin)
    _, _, after = rest.partition(end)
    page.write_text(f"{before}{begin}\n{table}\n{end}{after}")
