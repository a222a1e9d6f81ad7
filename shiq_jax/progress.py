"""Progress on stderr: count, rate and remaining time, as a bar on a terminal or as lines in a log file."""

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

# Work that takes fewer seconds leaves no final line.
MIN_SECONDS = 2.0
# Seconds between lines of a log file; the interval grows from the first value to the second.
MIN_INTERVAL, MAX_INTERVAL = 10.0, 60.0

# Commands turn the display on; library calls print nothing.
_enabled = False


@contextlib.contextmanager
def display() -> Iterator[None]:
    """Context, or decorator, in which `track` shows progress; outside it `track` only yields the items."""
    global _enabled
    previous, _enabled = _enabled, True
    try:
        yield
    finally:
        _enabled = previous


def track(
    items: Iterable[Item],
    description: str,
    total: int | None = None,
    unit: str = "items",
    *,
    initial: int = 0,
    amount: tuple[str, Callable[[Item], float]] | None = None,
    postfix: Callable[[], str] | None = None,
) -> Iterator[Item]:
    """Yield the items and, inside `display`, show their progress on stderr.

    Nested work is shown below the outer work. Rates exclude the first item, during which programs are compiled.

    Args:
        items: iterated lazily; an item counts as done when the next one is requested.
        description: name of the work.
        total: number of items including `initial`; None if unknown.
        unit: plural name of the items.
        initial: items done before, in a resumed run.
        amount: (second unit, size of an item in it), for example tokens.
        postfix: returns text to append, evaluated after each item.
    """
    amount_unit, size = amount or (None, lambda item: 0.0)
    with counter(description, total, unit, initial=initial, amount=amount_unit, postfix=postfix) as advance:
        for item in items:
            yield item
            advance(size(item))


@contextlib.contextmanager
def counter(
    description: str,
    total: int | None = None,
    unit: str = "items",
    *,
    initial: int = 0,
    amount: str | None = None,
    postfix: Callable[[], str] | None = None,
) -> Iterator[Callable[[float], None]]:
    """Progress of work that is not a loop over items; see `track` for the arguments.

    Yields a function to call once per finished item, with the item's size in the unit `amount`.
    """
    if not _enabled:
        yield lambda size=0.0: None
        return
    count = _Count(total, unit, initial, amount, postfix)
    with (_bar if _is_terminal() else _lines)(description, count) as show:

        def advance(size: float = 0.0) -> None:
            count.advance(size)
            show(False)

        yield advance
        show(True)


@dataclasses.dataclass
class _Count:
    total: int | None
    unit: str
    initial: int
    amount_unit: str | None
    postfix: Callable[[], str] | None
    items: int = 0
    amount: float = 0.0

    def __post_init__(self):
        self.start_time = self.rate_start = time.monotonic()
        self.rate_items, self.rate_amount = 0, 0.0

    def advance(self, amount: float) -> None:
        self.items, self.amount = self.items + 1, self.amount + amount
        if self.items == 1:
            self.first_rates = (1 / self._since(self.start_time), amount / self._since(self.start_time))
            self.rate_start, self.rate_items, self.rate_amount = time.monotonic(), 1, amount

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.start_time

    def text(self, *, elapsed: bool) -> str:
        """Count, rates, remaining time and postfix, optionally with the elapsed time."""
        done = self.initial + self.items
        fraction = f"/{self.total:,} {self.unit} ({done / max(self.total, 1):.0%})" if self.total else f" {self.unit}"
        parts = [f"{done:,}{fraction}"]
        if self.items:
            rate, amount_rate = self._rates()
            parts.append(f"{_format_rate(rate)} {self.unit}/s")
            if self.amount_unit:
                parts.append(f"{_format_rate(amount_rate)} {self.amount_unit}/s")
            if elapsed:
                parts.append(f"{_format_duration(self.elapsed)} elapsed")
            if self.total and done < self.total:
                parts.append(f"{_format_duration((self.total - done) / rate)} left")
            if self.postfix and (postfix := self.postfix()):
                parts.append(postfix)
        return ", ".join(parts)

    def _rates(self) -> tuple[float, float]:
        if self.items == 1:
            return self.first_rates
        seconds = self._since(self.rate_start)
        return (self.items - self.rate_items) / seconds, (self.amount - self.rate_amount) / seconds

    @staticmethod
    def _since(moment: float) -> float:
        return max(time.monotonic() - moment, 1e-9)


@contextlib.contextmanager
def _lines(description: str, count: _Count) -> Iterator[Callable[[bool], None]]:
    """Print a line at intervals of `MIN_INTERVAL` to `MAX_INTERVAL` seconds, and one at the end."""
    last_time, last_items = count.start_time, None

    def show(finished: bool) -> None:
        nonlocal last_time, last_items
        now = time.monotonic()
        due = now - last_time >= min(max(MIN_INTERVAL, count.elapsed / 10), MAX_INTERVAL)
        final = finished and count.elapsed >= MIN_SECONDS and last_items != count.items
        if count.items and (due or final):
            last_time, last_items = now, count.items
            print(f"{description}: {count.text(elapsed=True)}", file=sys.stderr, flush=True)

    yield show


# rich allows one live display at a time, which all current bars share.
_display = None


@contextlib.contextmanager
def _bar(description: str, count: _Count) -> Iterator[Callable[[bool], None]]:
    with _shared_display() as (progress, outermost):
        task = progress.add_task(
            description, total=count.total, completed=count.initial, state=count.text(elapsed=False)
        )

        def show(finished: bool) -> None:
            progress.update(task, completed=count.initial + count.items, state=count.text(elapsed=False))

        try:
            yield show
        finally:
            # Only outermost work that took a while stays on the screen.
            if not outermost or count.elapsed < MIN_SECONDS:
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
    # Restore the terminal's cursor even if the program exits inside a loop.
    atexit.register(progress.stop)
    try:
        with progress:
            _display = progress
            yield progress, True
    finally:
        _display = None
        atexit.unregister(progress.stop)


def _is_terminal() -> bool:
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


def _format_rate(value: float) -> str:
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 0.1 else f"{value:.2g}"


def _format_duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
