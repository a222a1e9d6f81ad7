"""Contestants take turns, step by step, and one that dies is named."""

import sys

import pytest

from benchmarks.workers import Worker, WorkerError, median, take_turns

SERVES = """
import sys, time
sys.path.insert(0, {place!r})
import serving
print("chatter")
def step():
    with open({log!r}, "a") as file:
        file.write({name!r})
    time.sleep({seconds})
    return {{"tokens": 7}}
serving.serve(step, speed={seconds})
"""


def worker(name, tmp_path, seconds):
    from benchmarks import serving

    program = tmp_path / f"{name}.py"
    place = serving.__file__.rsplit("/", 1)[0]
    program.write_text(SERVES.format(place=place, log=str(tmp_path / "order"), name=name, seconds=seconds))
    return Worker(name, [sys.executable, str(program)], tmp_path / f"{name}.log")


def test_turns_are_taken_in_alternating_order_and_timed(tmp_path):
    with worker("a", tmp_path, 0.2) as a, worker("b", tmp_path, 0.01) as b:
        assert a.ready() == {"speed": 0.2} and b.ready() == {"speed": 0.01}
        found = take_turns([a, b], 3)
    assert (tmp_path / "order").read_text() == "abbaab"
    assert median(found["a"]) >= 0.2 > median(found["b"]) >= 0.01
    assert all(step["tokens"] == 7 and step["peak_bytes"] > 1e6 for step in found["a"])
    assert "chatter" in (tmp_path / "a.log").read_text()


def test_a_worker_that_dies_is_named_with_its_last_words(tmp_path):
    program = "import sys; sys.exit('no such model')"
    with Worker("theirs", [sys.executable, "-c", program], tmp_path / "log") as dead:
        with pytest.raises(WorkerError, match="theirs ended without an answer .*no such model"):
            dead.ready()
