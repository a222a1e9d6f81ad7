"""Progress of long work on stderr: how far, how fast, how long; a bar on a terminal, plain lines in a log file."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")

# Work that is over sooner (in seconds) leaves no line: it would bury what took long.
BRIEF = 2.0
# Seconds between lines of a log file: dense at first, then fewer, since the file of a long run is read afterwards.
SOONEST, LATEST = 10.0, 60.0


# Whether anything is shown: the commands say so, a library call prints nothing.
_shown = False


@contextlib.contextmanager
def display() -> Iterator[None]:
    """Inside, also as a decorator, `track` shows progress on stderr; outside it only passes items through."""
    global _shown
    before, _shown = _shown, True
    try:
        yield
    finally:
        _shown = before


def track(
    items: Iterable[Item],
    what: str,
    total: int | None = None,
    unit: str = "items",
    *,
    first: int = 0,
    amount: tuple[str, Callable[[Item], float]] | None = None,
    note: Callable[[], str] | None = None,
) -> Iterator[Item]:
    """Pass the items on, each when it is asked for, and show on stderr how far they are and how fast, inside `shown`.

    Work inside tracked work shows under it. Rates leave out the first item, in which programs are compiled.

    Args:
        items: the work; an item counts as done when the next one is asked for.
        what: name of the work.
        total: number of items with those of `first`; None where nobody knows.
        unit: what an item is, in the plural.
        first: items that were done before, by a run that this one goes on with.
        amount: a second unit and how much of it an item is, for instance tokens.
        note: more to say behind the numbers, asked for after an item is done.
    """
    name, size = amount or (None, lambda item: 0.0)
    with counter(what, total, unit, first=first, amount=name, note=note) as advance:
        for item in items:
            yield item
            advance(size(item))


@contextlib.contextmanager
def counter(
    what: str,
    total: int | None = None,
    unit: str = "items",
    *,
    first: int = 0,
    amount: str | None = None,
    note: Callable[[], str] | None = None,
) -> Iterator[Callable[[float], None]]:
    """Inside, call the returned function once per item that is done, with its size in the unit `amount`.

    For work that is not an iteration; the arguments are those of `track`.
    """
    if not _shown:
        yield lambda size=0.0: None
        return
    count = _Count(total, unit, first, amount, note)
    with (_bar if _live_terminal() else _lines)(what, count) as show:

        def advance(size: float = 0.0) -> None:
            count.advance(size)
            show(False)

        yield advance
        show(True)


@dataclasses.dataclass
class _Count:
    total: int | None
    unit: str
    first: int
    amount_unit: str | None
    note: Callable[[], str] | None
    items: int = 0
    amount: float = 0.0

    def __post_init__(self):
        self.began = self.base = time.monotonic()
        self.base_items, self.base_amount = 0, 0.0

    def advance(self, amount: float) -> None:
        self.items, self.amount = self.items + 1, self.amount + amount
        if self.items == 1:
            self.first_rate = (1 / self._since(self.began), amount / self._since(self.began))
            self.base, self.base_items, self.base_amount = time.monotonic(), 1, amount

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.began

    def text(self, *, elapsed: bool) -> str:
        """Count, rates, times and note; `elapsed` where nothing else shows a clock."""
        done = self.first + self.items
        share = f"/{self.total:,} {self.unit} ({done / max(self.total, 1):.0%})" if self.total else f" {self.unit}"
        parts = [f"{done:,}{share}"]
        if self.items:
            rate, amount_rate = self._rates()
            parts.append(f"{_number(rate)} {self.unit}/s")
            if self.amount_unit:
                parts.append(f"{_number(amount_rate)} {self.amount_unit}/s")
            if elapsed:
                parts.append(f"{_duration(self.elapsed)} elapsed")
            if self.total and done < self.total:
                parts.append(f"{_duration((self.total - done) / rate)} left")
            if self.note and (note := self.note()):
                parts.append(note)
        return ", ".join(parts)

    def _rates(self) -> tuple[float, float]:
        if self.items == 1:
            return self.first_rate
        seconds = self._since(self.base)
        return (self.items - self.base_items) / seconds, (self.amount - self.base_amount) / seconds

    @staticmethod
    def _since(moment: float) -> float:
        return max(time.monotonic() - moment, 1e-9)


@contextlib.contextmanager
def _lines(what: str, count: _Count) -> Iterator[Callable[[bool], None]]:
    """Plain lines: after ten seconds, later once a minute, and at the end."""
    last = said = count.began

    def show(over: bool) -> None:
        nonlocal last, said
        now = time.monotonic()
        due = now - last >= min(max(SOONEST, count.elapsed / 10), LATEST)
        ending = over and count.elapsed >= BRIEF and said != count.items
        if count.items and (due or ending):
            last, said = now, count.items
            print(f"{what}: {count.text(elapsed=True)}", file=sys.stderr, flush=True)

    yield show


# A terminal has room for one live display, which all the bars of the moment share.
_display = None


@contextlib.contextmanager
def _bar(what: str, count: _Count) -> Iterator[Callable[[bool], None]]:
    with _shared_display() as (progress, outermost):
        task = progress.add_task(what, total=count.total, completed=count.first, state=count.text(elapsed=False))

        def show(over: bool) -> None:
            progress.update(task, completed=count.first + count.items, state=count.text(elapsed=False))

        try:
            yield show
        finally:
            # What stays on the screen is the outermost work, and of it what took long.
            if not outermost or count.elapsed < BRIEF:
                progress.remove_task(task)


@contextlib.contextmanager
def _shared_display():
    global _display
    if _display is not None:
        yield _display, False
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Column

    state = TextColumn("{task.fields[state]}", table_column=Column(no_wrap=True, overflow="ellipsis"))
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=16), TimeElapsedColumn(), state)
    progress = Progress(*columns, console=Console(stderr=True))
    # A program that dies inside a loop gives the terminal its cursor back.
    atexit.register(progress.stop)
    try:
        with progress:
            _display = progress
            yield progress, True
    finally:
        _display = None
        atexit.unregister(progress.stop)


def _live_terminal() -> bool:
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


def _number(value: float) -> str:
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 0.1 else f"{value:.2g}"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
