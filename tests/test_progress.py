"""Progress reports: item order, rates and times, log lines and terminal bars."""

import io
import re
import sys
import types

import pytest

from shiq_jax import progress
from shiq_jax.progress import track


@pytest.fixture(autouse=True)
def display():
    """Show progress, as the commands do."""
    with progress.display():
        yield


@pytest.fixture
def clock(monkeypatch):
    """Manual clock: `clock.now += seconds` advances it."""
    manual = types.SimpleNamespace(now=100.0)
    manual.monotonic = lambda: manual.now
    monkeypatch.setattr(progress, "time", manual)
    return manual


def replace_stderr_with_terminal(monkeypatch, kind="xterm"):
    """Return the stream of a fake terminal; call it in the test itself, since pytest replaces stderr after fixtures."""
    stream = io.StringIO()
    stream.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", stream)
    for name, value in {"TERM": kind, "COLUMNS": "120"}.items():
        monkeypatch.setenv(name, value)
    return stream


def consume(clock, seconds, items, *args, **kwargs):
    """Return the items that `track` yields, advancing the clock by `seconds` after each."""
    result = []
    for item in track(items, *args, **kwargs):
        result.append(item)
        clock.now += seconds
    return result


def test_track_yields_items_and_reports_rates(clock, capsys):
    assert consume(clock, 4, iter("abcdef"), "sampling", 6, "prompts") == list("abcdef")
    captured = capsys.readouterr()
    # At most one line per ten seconds, so one after 12 s and one at the end.
    assert captured.err == (
        "sampling: 3/6 prompts (50%), 0.25 prompts/s, 0:12 elapsed, 0:12 left\n"
        "sampling: 6/6 prompts (100%), 0.25 prompts/s, 0:24 elapsed\n"
    )
    assert captured.out == ""


def test_rates_exclude_the_first_item(clock, capsys):
    seconds = iter([60, 2, 2, 2])
    for _ in track(range(4), "update", 10, "updates", amount=("tokens", lambda item: 100)):
        clock.now += next(seconds)
    first, last = capsys.readouterr().err.splitlines()
    assert first.startswith("update: 1/10 updates (10%), 0.017 updates/s, 1.67 tokens/s, 1:00 elapsed, 9:00 left")
    assert last.startswith("update: 4/10 updates (40%), 0.50 updates/s, 50.0 tokens/s, 1:06 elapsed, 0:12 left")


def test_rates_exclude_items_of_earlier_runs(clock, capsys):
    consume(clock, 1, range(5), "sampling", 100, "batches", first=95)
    assert capsys.readouterr().err == "sampling: 100/100 batches (100%), 1.00 batches/s, 0:05 elapsed\n"


def test_unknown_total(clock, capsys):
    consume(clock, 0.001, range(4000), "reading data", unit="records")
    assert capsys.readouterr().err == "reading data: 4,000 records, 1,000 records/s, 0:04 elapsed\n"


def test_note_is_evaluated_after_the_item(clock, capsys):
    latest = {}
    for item in track(range(3), "update", 3, "updates", postfix=lambda: f"loss {latest['loss']}"):
        latest["loss"] = item / 2
        clock.now += 1
    assert capsys.readouterr().err.endswith(", loss 1.0\n")


def test_long_work_reports_once_a_minute(clock, capsys):
    consume(clock, 1, range(3600), "update", 3600, "updates")
    lines = capsys.readouterr().err.splitlines()
    assert 55 < len(lines) < 80 and "0:10 elapsed" in lines[0] and "1:00:00 elapsed" in lines[-1]
    assert all(re.fullmatch(r"[\x20-\x7e]+", line) for line in lines)


def test_short_work_reports_nothing(clock, capsys):
    assert consume(clock, 0.001, range(1000), "updates", 1000) == list(range(1000))
    assert list(track([], "updates", 0)) == []
    assert capsys.readouterr().err == ""


def test_track_is_lazy(clock):
    consumed = []
    items = track((consumed.append(i) or i for i in range(5)), "updates", 5)
    assert consumed == [] and next(items) == 0 and consumed == [0]


def test_terminal_shows_nested_bars(clock, monkeypatch):
    terminal = replace_stderr_with_terminal(monkeypatch)
    for _ in track(range(3), "update", 3, "updates", amount=("tokens", lambda item: 7)):
        consume(clock, 1, range(2), "evaluation samples", 2, "batches")
    output = terminal.getvalue()
    assert "3/3 updates (100%), 0.50 updates/s, 3.50 tokens/s" in output and "evaluation samples" in output
    # Only the outermost bar stays on the screen.
    last = output.rstrip().splitlines()[-2]
    assert "3/3 updates" in last and "evaluation" not in last
    assert progress._display is None


def test_interrupted_work_restores_the_terminal(clock, monkeypatch):
    terminal = replace_stderr_with_terminal(monkeypatch)

    def interrupted():
        for item in track(range(3), "update", 3):
            if item == 1:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert progress._display is None and terminal.getvalue().rstrip().endswith("\x1b[?25h")
    assert consume(clock, 3, range(2), "sampling", 2) == [0, 1]
    assert "sampling" in terminal.getvalue()


def test_dumb_terminal_gets_plain_lines(clock, monkeypatch):
    terminal = replace_stderr_with_terminal(monkeypatch, "dumb")
    consume(clock, 3, range(2), "sampling", 2)
    assert terminal.getvalue() == "sampling: 2/2 items (100%), 0.33 items/s, 0:06 elapsed\n"


def test_library_calls_report_nothing(clock, capsys, monkeypatch):
    monkeypatch.setattr(progress, "_shown", False)
    assert consume(clock, 40, iter("ab"), "sampling", 2) == ["a", "b"]
    assert capsys.readouterr().err == ""
