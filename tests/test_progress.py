"""Progress that passes everything on and tells the truth about rates: plain lines in a file, bars on a terminal."""

import io
import re
import sys
import types

import pytest

from shiq_jax import progress
from shiq_jax.progress import track


@pytest.fixture(autouse=True)
def shown():
    """Progress is shown, as the commands show it."""
    with progress.display():
        yield


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes on only when told: `clock.now += seconds`."""
    fake = types.SimpleNamespace(now=100.0)
    fake.monotonic = lambda: fake.now
    monkeypatch.setattr(progress, "time", fake)
    return fake


def terminal_of(monkeypatch, kind="xterm"):
    """What a terminal in place of stderr is sent; only in the test itself, since fixtures run under another stderr."""
    stream = io.StringIO()
    stream.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", stream)
    for name, value in {"TERM": kind, "COLUMNS": "120"}.items():
        monkeypatch.setenv(name, value)
    return stream


def work(clock, seconds, items, *args, **options):
    """Pass through tracked work, each item of which takes so many seconds."""
    seen = []
    for item in track(items, *args, **options):
        seen.append(item)
        clock.now += seconds
    return seen


def test_progress_passes_items_on_and_says_how_fast(clock, capsys):
    assert work(clock, 4, iter("abcdef"), "sampling", 6, "prompts") == list("abcdef")
    captured = capsys.readouterr()
    # Every ten seconds at most, so after 12 s and at the end; 4 s each are 0.25 per second, and 3 take 12 s more.
    assert captured.err == (
        "sampling: 3/6 prompts (50%), 0.25 prompts/s, 0:12 elapsed, 0:12 left\n"
        "sampling: 6/6 prompts (100%), 0.25 prompts/s, 0:24 elapsed\n"
    )
    assert captured.out == ""


def test_the_first_item_which_compiles_is_left_out_of_the_rates(clock, capsys):
    seconds = iter([60, 2, 2, 2])
    for _ in track(range(4), "update", 10, "updates", amount=("tokens", lambda item: 100)):
        clock.now += next(seconds)
    first, last = capsys.readouterr().err.splitlines()
    assert first.startswith("update: 1/10 updates (10%), 0.017 updates/s, 1.67 tokens/s, 1:00 elapsed, 9:00 left")
    assert last.startswith("update: 4/10 updates (40%), 0.50 updates/s, 50.0 tokens/s, 1:06 elapsed, 0:12 left")


def test_what_was_done_before_counts_but_not_for_the_rate(clock, capsys):
    work(clock, 1, range(5), "sampling", 100, "batches", initial=95)
    assert capsys.readouterr().err == "sampling: 100/100 batches (100%), 1.00 batches/s, 0:05 elapsed\n"


def test_work_of_unknown_length_says_what_it_can(clock, capsys):
    work(clock, 0.001, range(4000), "reading data", unit="records")
    assert capsys.readouterr().err == "reading data: 4,000 records, 1,000 records/s, 0:04 elapsed\n"


def test_a_note_stands_at_the_end_and_is_asked_for_late(clock, capsys):
    latest = {}
    for item in track(range(3), "update", 3, "updates", postfix=lambda: f"loss {latest['loss']}"):
        latest["loss"] = item / 2
        clock.now += 1
    assert capsys.readouterr().err.endswith(", loss 1.0\n")


def test_an_hour_is_told_in_about_sixty_lines(clock, capsys):
    work(clock, 1, range(3600), "update", 3600, "updates")
    lines = capsys.readouterr().err.splitlines()
    assert 55 < len(lines) < 80 and "0:10 elapsed" in lines[0] and "1:00:00 elapsed" in lines[-1]
    assert all(re.fullmatch(r"[\x20-\x7e]+", line) for line in lines)


def test_what_is_soon_over_says_nothing(clock, capsys):
    assert work(clock, 0.001, range(1000), "updates", 1000) == list(range(1000))
    assert list(track([], "updates", 0)) == []
    assert capsys.readouterr().err == ""


def test_progress_is_lazy(clock):
    taken = []
    items = track((taken.append(number) or number for number in range(5)), "updates", 5)
    assert taken == [] and next(items) == 0 and taken == [0]


def test_a_terminal_gets_bars_one_under_the_other(clock, monkeypatch):
    terminal = terminal_of(monkeypatch)
    for _ in track(range(3), "update", 3, "updates", amount=("tokens", lambda item: 7)):
        work(clock, 1, range(2), "evaluation samples", 2, "batches")
    shown = terminal.getvalue()
    assert "3/3 updates (100%), 0.50 updates/s, 3.50 tokens/s" in shown and "evaluation samples" in shown
    # What stays on the screen is the outer work alone.
    last = shown.rstrip().splitlines()[-2]
    assert "3/3 updates" in last and "evaluation" not in last
    assert progress._display is None


def test_a_terminal_is_handed_back_when_work_breaks_off(clock, monkeypatch):
    terminal = terminal_of(monkeypatch)

    def dies():
        for item in track(range(3), "update", 3):
            if item == 1:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dies()
    assert progress._display is None and terminal.getvalue().rstrip().endswith("\x1b[?25h")
    assert work(clock, 3, range(2), "sampling", 2) == [0, 1]
    assert "sampling" in terminal.getvalue()


def test_a_terminal_without_control_sequences_gets_lines(clock, monkeypatch):
    terminal = terminal_of(monkeypatch, "dumb")
    work(clock, 3, range(2), "sampling", 2)
    assert terminal.getvalue() == "sampling: 2/2 items (100%), 0.33 items/s, 0:06 elapsed\n"


def test_a_library_call_prints_nothing(clock, capsys, monkeypatch):
    monkeypatch.setattr(progress, "_enabled", False)
    assert work(clock, 40, iter("ab"), "sampling", 2) == ["a", "b"]
    assert capsys.readouterr().err == ""
