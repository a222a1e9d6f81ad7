"""The metrics log after interruptions, and the rows that its trackers receive."""

import json

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from shiq_jax.runs.metrics import MetricsLog


@pytest.fixture
def log(tmp_path):
    return MetricsLog(tmp_path / "metrics.jsonl")


def write_steps(log, stage, first, last):
    for step in range(first, last + 1):
        log.write(stage, step, loss=step / 4)


def test_lines_are_json_objects_in_order(log):
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
def test_array_scalars_become_python_numbers(value, log):
    log.write("passes", np.int64(7), loss=value, count=np.int32(3), done=np.bool_(True))
    row = json.loads(log.path.read_text())
    assert row == {"stage": "passes", "step": 7, "loss": 1.5, "count": 3, "done": True}
    assert [type(item) for item in row.values()] == [str, int, float, int, bool]


def test_array_value_is_an_error_and_writes_no_line(log):
    log.write("passes", 1, loss=1.0)
    with pytest.raises(ValueError):
        log.write("passes", 2, loss=np.zeros(2))
    assert len(log.rows()) == 1 and log.path.read_bytes().endswith(b"\n")


def test_resumed_log_equals_uninterrupted_log(tmp_path):
    uninterrupted, interrupted = (
        MetricsLog(tmp_path / "uninterrupted.jsonl"),
        MetricsLog(tmp_path / "interrupted.jsonl"),
    )
    for log in (uninterrupted, interrupted):
        write_steps(log, "warm_start", 1, 3)
    write_steps(uninterrupted, "passes", 1, 6)
    # Interrupted after step 5, with the last checkpoint at step 3.
    write_steps(interrupted, "passes", 1, 5)
    resumed = MetricsLog(interrupted.path)
    resumed.rewind(["passes"], 3)
    assert [row["step"] for row in resumed.rows("passes")] == [1, 2, 3]
    write_steps(resumed, "passes", 4, 6)
    assert interrupted.path.read_bytes() == uninterrupted.path.read_bytes()


def test_rewind_keeps_other_stages(log):
    for stage in ("warm_start", "passes", "evaluation"):
        write_steps(log, stage, 1, 4)
    log.rewind({"passes", "evaluation"}, 2)
    steps = {stage: [row["step"] for row in log.rows(stage)] for stage in ("warm_start", "passes", "evaluation")}
    assert steps == {"warm_start": [1, 2, 3, 4], "passes": [1, 2], "evaluation": [1, 2]}
    log.rewind(["passes"], 0)
    assert log.rows("passes") == [] and len(log.rows()) == 6


def test_rewind_does_not_create_a_missing_file(log):
    log.rewind(["passes"], 0)
    assert not log.path.exists()


@pytest.mark.parametrize("length", range(1, 40, 6))
def test_truncated_line_is_dropped(length, log):
    write_steps(log, "passes", 1, 2)
    complete = log.path.read_bytes()
    log.path.write_bytes(complete + complete.splitlines()[0][:length])
    reopened = MetricsLog(log.path)
    assert [row["step"] for row in reopened.rows()] == [1, 2]
    reopened.write("passes", 3, loss=0.75)
    assert [row["step"] for row in reopened.rows()] == [1, 2, 3] and log.path.read_bytes().startswith(complete)


def test_reader_does_not_modify_a_line_being_written(log):
    write_steps(log, "passes", 1, 2)
    content = log.path.read_bytes() + b'{"stage": "pass'
    log.path.write_bytes(content)
    assert len(MetricsLog(log.path).rows()) == 2 and log.path.read_bytes() == content


def test_missing_final_newline_is_restored(log):
    write_steps(log, "passes", 1, 2)
    content = log.path.read_bytes()
    log.path.write_bytes(content[:-1])
    MetricsLog(log.path).write("passes", 3, loss=0.75)
    assert [row["step"] for row in log.rows()] == [1, 2, 3] and log.path.read_bytes().startswith(content)


class RecordingTracker:
    """Tracker that keeps the rows it received."""

    def __init__(self):
        self.rows, self.starts, self.closed = [], 0, False

    def begin(self, rows):
        self.rows, self.starts = list(rows), self.starts + 1

    def write(self, row):
        self.rows.append(row)

    def close(self):
        self.closed = True


def test_tracker_follows_writes_and_rewinds(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_steps(MetricsLog(path), "warm start", 1, 3)
    tracker = RecordingTracker()
    log = MetricsLog(path, [tracker])
    assert tracker.starts == 0
    log.rewind(["warm start"], 2)
    # Trackers start with the first new row, so a run rejected before that leaves no trace in them.
    assert tracker.starts == 0
    for change in (
        lambda: log.write("update", 1, loss=jnp.float32(0.5)),
        lambda: log.write("update", 2, loss=0.25),
        lambda: log.rewind(["update"], 1),
        lambda: log.rewind(["update"], 1),
        lambda: log.write("update", 2, loss=0.125),
    ):
        change()
        assert tracker.rows == log.rows()
    assert tracker.starts == 2 and len(tracker.rows) == 4 and not tracker.closed
    log.close()
    assert tracker.closed


def test_begin_starts_the_trackers_once(log):
    write_steps(log, "update", 1, 3)
    tracker = RecordingTracker()
    reopened = MetricsLog(log.path, [tracker])
    reopened.begin()
    reopened.begin()
    assert tracker.starts == 1 and tracker.rows == log.rows()
