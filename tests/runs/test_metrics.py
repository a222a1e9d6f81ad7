"""A log that an interruption leaves no trace in, and trackers that see what it holds."""

import json

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from shiq_jax.runs.metrics import MetricsLog


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
    assert [row["step"] for row in again.rows()] == [1, 2]
    again.write("passes", 3, loss=0.75)
    assert [row["step"] for row in again.rows()] == [1, 2, 3] and log.path.read_bytes().startswith(whole)


def test_a_reader_leaves_a_line_that_is_being_written_alone(log):
    fill(log, "passes", 1, 2)
    half = log.path.read_bytes() + b'{"stage": "pass'
    log.path.write_bytes(half)
    assert len(MetricsLog(log.path).rows()) == 2 and log.path.read_bytes() == half


def test_only_the_end_of_the_last_line_was_cut(log):
    fill(log, "passes", 1, 2)
    whole = log.path.read_bytes()
    log.path.write_bytes(whole[:-1])
    MetricsLog(log.path).write("passes", 3, loss=0.75)
    assert [row["step"] for row in log.rows()] == [1, 2, 3] and log.path.read_bytes().startswith(whole)


class Mirror:
    """A tracker that remembers what it was told, as a viewer would show it."""

    def __init__(self):
        self.shown, self.begun, self.closed = [], 0, False

    def begin(self, rows):
        self.shown, self.begun = list(rows), self.begun + 1

    def write(self, row):
        self.shown.append(row)

    def close(self):
        self.closed = True


def test_a_tracker_shows_what_the_log_holds_whatever_happens(tmp_path):
    path = tmp_path / "metrics.jsonl"
    fill(MetricsLog(path), "warm start", 1, 3)
    mirror = Mirror()
    log = MetricsLog(path, [mirror])
    assert mirror.begun == 0
    log.rewind(["warm start"], 2)
    # Nothing was written yet, so whoever is refused now has told nobody of this run.
    assert mirror.begun == 0
    for change in (
        lambda: log.write("update", 1, loss=jnp.float32(0.5)),
        lambda: log.write("update", 2, loss=0.25),
        lambda: log.rewind(["update"], 1),
        lambda: log.rewind(["update"], 1),
        lambda: log.write("update", 2, loss=0.125),
    ):
        change()
        assert mirror.shown == log.rows()
    assert mirror.begun == 2 and len(mirror.shown) == 4 and not mirror.closed
    log.close()
    assert mirror.closed


def test_a_finished_log_is_shown_once(log):
    fill(log, "update", 1, 3)
    mirror = Mirror()
    again = MetricsLog(log.path, [mirror])
    again.begin()
    again.begin()
    assert mirror.begun == 1 and mirror.shown == log.rows()
