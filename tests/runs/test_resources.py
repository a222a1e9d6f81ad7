"""Runs and evaluations close their checkpoint managers, event loops and threads."""

import asyncio
import gc
import threading

import pytest
from orbax.checkpoint import CheckpointManager

import eval as eval_script
import train as train_script

pytestmark = pytest.mark.usefixtures("quick_compilation")


def resources() -> dict:
    """Open threads, event loops and checkpoint managers of this process."""
    gc.collect()
    objects = gc.get_objects()
    # `isinstance` would trigger lazy imports and proxies.
    loops = [item for item in objects if issubclass(type(item), asyncio.AbstractEventLoop)]
    return {
        "threads": {thread.name for thread in threading.enumerate()},
        "event loops": sum(not loop.is_closed() for loop in loops),
        "checkpoint managers": sum(issubclass(type(item), CheckpointManager) for item in objects),
    }


@pytest.mark.slow
def test_run_and_evaluation_close_their_resources(tiny, tmp_path):
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
