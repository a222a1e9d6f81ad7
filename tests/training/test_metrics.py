"""A log that an interruption leaves no trace in, and progress that passes everything on."""

import io
import json
import sys
import types

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from shiq_jax.training import metrics
from shiq_jax.training.metrics import MetricsLog, track


@pytest.fixture
def log(tmp_path):
    return MetricsLog(tmp_path / "metrics.jsonl")


def fill(log, stage, first, last):
    for step in range(first, last + 1):
        log.write(stage, step, loss=step / 4)


def test_each_line_is_an_object_in_order(log):
    assert log.rows() == []
    log.write("passes", 1, loss=0.5, note="first")
    log.write("evaluation", 1, kl=0.25)
    lines = [json.loads(line) for line in log.path.read_text().splitlines()]
    first, second = {"stage": "passes", "step": 1, "loss": 0.5, "note": "first"}, {"stage": "evaluation", "step": 1}
    assert lines == log.rows() == [first, second | {"kl": 0.25}]
    assert log.rows("evaluation") == lines[1:] and log.rows("warm_start") == []


@pytest.mark.parametrize(
    "value",
    [np.float32(1.5), np.float64(1.5), np.array([1.5]), jnp.float32(1.5), np.array(1.5, ml_dtypes.bfloat16), 1.5],
    ids=["float32", "float64", "one element", "jax", "bfloat16", "python"],
)
def test_numbers_of_any_library_become_plain(value, log):
    log.write("passes", np.int64(7), loss=value, count=np.int32(3), done=np.bool_(True))
    row = json.loads(log.path.read_text())
    assert row == {"stage": "passes", "step": 7, "loss": 1.5, "count": 3, "done": True}
    assert [type(each) for each in row.values()] == [str, int, float, int, bool]


def test_an_array_is_no_number_and_leaves_no_line(log):
    log.write("passes", 1, loss=1.0)
    with pytest.raises(ValueError):
        log.write("passes", 2, loss=np.zeros(2))
    assert len(log.rows()) == 1 and log.path.read_bytes().endswith(b"\n")


def test_an_interrupted_log_becomes_that_of_one_run(tmp_path):
    whole, broken = MetricsLog(tmp_path / "whole.jsonl"), MetricsLog(tmp_path / "broken.jsonl")
    for log in (whole, broken):
        fill(log, "warm_start", 1, 3)
    fill(whole, "passes", 1, 6)
    # Five steps were done but the last checkpoint is of the third.
    fill(broken, "passes", 1, 5)
    resumed = MetricsLog(broken.path)
    resumed.rewind(["passes"], 3)
    assert [row["step"] for row in resumed.rows("passes")] == [1, 2, 3]
    fill(resumed, "passes", 4, 6)
    assert broken.path.read_bytes() == whole.path.read_bytes()


def test_rewind_touches_only_its_stages(log):
    for stage in ("warm_start", "passes", "evaluation"):
        fill(log, stage, 1, 4)
    log.rewind({"passes", "evaluation"}, 2)
    steps = {stage: [row["step"] for row in log.rows(stage)] for stage in ("warm_start", "passes", "evaluation")}
    assert steps == {"warm_start": [1, 2, 3, 4], "passes": [1, 2], "evaluation": [1, 2]}
    log.rewind(["passes"], 0)
    assert log.rows("passes") == [] and len(log.rows()) == 6


def test_rewind_of_a_log_that_is_not_there_makes_none(log):
    log.rewind(["passes"], 0)
    assert not log.path.exists()


@pytest.mark.parametrize("kept", range(1, 40, 6))
def test_a_line_that_was_cut_is_dropped(kept, log):
    fill(log, "passes", 1, 2)
    whole = log.path.read_bytes()
    log.path.write_bytes(whole + whole.splitlines()[0][:kept])
    again = MetricsLog(log.path)
    assert log.path.read_bytes() == whole
    again.write("passes", 3, loss=0.75)
    assert [row["step"] for row in again.rows()] == [1, 2, 3]


def test_only_the_end_of_the_last_line_was_cut(log):
    fill(log, "passes", 1, 2)
    whole = log.path.read_bytes()
    log.path.write_bytes(whole[:-1])
    MetricsLog(log.path).write("passes", 3, loss=0.75)
    assert [row["step"] for row in log.rows()] == [1, 2, 3] and log.path.read_bytes().startswith(whole)


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes on only when told: `clock.now += seconds`."""
    fake = types.SimpleNamespace(now=100.0)
    fake.monotonic = lambda: fake.now
    monkeypatch.setattr(metrics, "time", fake)
    return fake


def test_progress_passes_items_on_and_says_how_fast(clock, capsys):
    seen = []
    for item in track((letter for letter in "abcdef"), "sampling", 6, "prompts"):
        seen.append(item)
        clock.now += 4
    assert seen == list("abcdef")
    captured = capsys.readouterr()
    # Every ten seconds at most, so after 12 s and at the end; 4 s each are 0.25 per second.
    assert captured.err == "sampling: 3/6 prompts, 0.25 prompts/s\nsampling: 6/6 prompts, 0.25 prompts/s\n"
    assert captured.out == ""


def test_progress_is_lazy(clock):
    taken = []
    items = track((taken.append(number) or number for number in range(5)), "updates", 5)
    assert taken == [] and next(items) == 0 and taken == [0]


def test_a_fast_loop_says_one_line_and_an_empty_one_none(clock, capsys):
    assert list(track(range(1000), "updates", 1000)) == list(range(1000))
    assert capsys.readouterr().err.count("\n") == 1
    assert list(track([], "updates", 0)) == []
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    assert list(track(range(3), "warm start", 3, "updates")) == [0, 1, 2]
    shown = terminal.getvalue()
    assert "warm start" in shown and "3/3" in shown and "updates/s" in shown
