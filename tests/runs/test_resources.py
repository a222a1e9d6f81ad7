"""A run and an evaluation close what they opened: checkpointers, event loops and threads."""

import asyncio
import gc
import threading

import pytest
from orbax.checkpoint import CheckpointManager

import eval as eval_script
import train as train_script

pytestmark = pytest.mark.usefixtures("quick_compilation")


def resources() -> dict:
    """What is open in this process."""
    gc.collect()
    kept = gc.get_objects()
    # `type` and not `isinstance`, which would wake lazy modules and proxies.
    loops = [each for each in kept if issubclass(type(each), asyncio.AbstractEventLoop)]
    return {
        "threads": {thread.name for thread in threading.enumerate()},
        "event loops": sum(not loop.is_closed() for loop in loops),
        "checkpoint managers": sum(issubclass(type(each), CheckpointManager) for each in kept),
    }


@pytest.mark.slow
def test_a_run_and_an_evaluation_leave_nothing_open(tiny, tmp_path):
    rows, out = tmp_path / "rows.jsonl", str(tmp_path / "run")
    rows.write_text('{"prompt": "a", "completion": "b"}\n' * 2)
    before = resources()
    train_script.main([
        "sft", "--model", tiny, "--data", str(rows), "--output-dir", out, "--epochs", "2", "--batch-size", "2",
        "--save-every", "1",
    ])  # fmt: skip
    eval_script.main([
        "--model", out, "--data", str(rows), "--output-dir", f"{out} evaluated", "--max-tokens", "2",
        "--samples-per-prompt", "1", "--no-greedy",
    ])  # fmt: skip
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 2
    assert resources() == before
