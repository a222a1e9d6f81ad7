"""Benchmark workers: interleaving, timing, and errors of workers that exit."""

import sys

import pytest

from benchmarks.workers import Worker, WorkerError, run_interleaved, seconds_per_step

WORKER_PROGRAM = """
import sys, time
sys.path.insert(0, {directory!r})
import serving
print("unrelated output")
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
    directory = serving.__file__.rsplit("/", 1)[0]
    program.write_text(
        WORKER_PROGRAM.format(directory=directory, log=str(tmp_path / "order"), name=name, seconds=seconds)
    )
    return Worker(name, [sys.executable, str(program)], tmp_path / f"{name}.log")


def test_interleaved_steps_reverse_order_and_are_timed(tmp_path):
    with worker("a", tmp_path, 0.2) as a, worker("b", tmp_path, 0.01) as b:
        assert a.info == {"speed": 0.2} and b.info == {"speed": 0.01}
        timings = run_interleaved([a, b], 3)
    assert (tmp_path / "order").read_text() == "abbaab"
    assert seconds_per_step(timings["a"]) >= 0.2 > seconds_per_step(timings["b"]) >= 0.01
    assert all(step["tokens"] == 7 and step["peak_bytes"] > 1e6 for step in timings["a"])
    assert "unrelated output" in (tmp_path / "a.log").read_text()


def test_seconds_per_step_averages_medians_of_distinct_steps():
    timings = [{"step": 0, "seconds": 1.0}, {"step": 1, "seconds": 8.0}, {"step": 0, "seconds": 3.0}]
    assert seconds_per_step(timings) == 5.0
    assert seconds_per_step([{"seconds": 1.0}, {"seconds": 2.0}, {"seconds": 9.0}]) == 2.0


def test_worker_error_has_the_name_and_the_end_of_the_log(tmp_path):
    program = "import sys; sys.exit('no such model')"
    with pytest.raises(WorkerError, match="peer exited without a response .*no such model"):
        with Worker("peer", [sys.executable, "-c", program], tmp_path / "log"):
            pass
    program = "import sys; print('ready {}', flush=True); sys.stdin.readline(); sys.exit('failed in step')"
    with Worker("peer", [sys.executable, "-c", program], tmp_path / "log") as worker:
        with pytest.raises(WorkerError, match="failed in step"):
            worker.step()


def test_worker_memory_is_limited(tmp_path):
    program = "print('ready {}', flush=True); input(); held = bytearray(10**9)"
    with Worker("large", [sys.executable, "-c", program], tmp_path / "log", memory=5 * 10**8) as large:
        with pytest.raises(WorkerError, match="MemoryError"):
            large.step()
