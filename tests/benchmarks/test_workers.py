"""Contestants take turns, step by step, and one that dies is named."""

import sys

import pytest

from benchmarks.workers import Worker, WorkerError, seconds_per_step, take_turns

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
        assert a.about == {"speed": 0.2} and b.about == {"speed": 0.01}
        found = take_turns([a, b], 3)
    assert (tmp_path / "order").read_text() == "abbaab"
    assert seconds_per_step(found["a"]) >= 0.2 > seconds_per_step(found["b"]) >= 0.01
    assert all(step["tokens"] == 7 and step["peak_bytes"] > 1e6 for step in found["a"])
    assert "chatter" in (tmp_path / "a.log").read_text()


def test_unlike_steps_count_alike_however_often_each_was_taken():
    taken = [{"step": 0, "seconds": 1.0}, {"step": 1, "seconds": 8.0}, {"step": 0, "seconds": 3.0}]
    assert seconds_per_step(taken) == 5.0
    assert seconds_per_step([{"seconds": 1.0}, {"seconds": 2.0}, {"seconds": 9.0}]) == 2.0


def test_a_worker_that_dies_is_named_with_its_last_words(tmp_path):
    program = "import sys; sys.exit('no such model')"
    with pytest.raises(WorkerError, match="theirs ended without an answer .*no such model"):
        with Worker("theirs", [sys.executable, "-c", program], tmp_path / "log"):
            pass
    later = "import sys; print('ready {}', flush=True); sys.stdin.readline(); sys.exit('too late')"
    with Worker("theirs", [sys.executable, "-c", later], tmp_path / "log") as dying:
        with pytest.raises(WorkerError, match="too late"):
            dying.step()


def test_a_worker_gets_no_more_memory_than_it_may_have(tmp_path):
    program = "print('ready {}', flush=True); input(); held = bytearray(10**9)"
    with Worker("large", [sys.executable, "-c", program], tmp_path / "log", memory=5 * 10**8) as large:
        with pytest.raises(WorkerError, match="MemoryError"):
            large.step()
