"""A full disk stops a run with a one-line error wherever the run writes, and --resume continues once there is space."""

import contextlib
import json
import resource

import pytest

import train as train_script
from shiq_jax.models import huggingface
from shiq_jax.replay import Buffer
from shiq_jax.runs import pipeline
from shiq_jax.runs.metrics import MetricsLog
from shiq_jax.tasks.tiny import tiny_directory
from shiq_jax.training.checkpoints import Checkpoints

pytestmark = pytest.mark.usefixtures("quick_compilation")

SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1}
OPTIONS = [
    "--mesh", "fsdp=1", "--warm-start.steps", "0", "--collection.prompts", "4", "--collection.prompts-per-batch", "2",
    "--collection.samples-per-prompt", "2", "--collection.sampling.max-tokens", "4", "--evaluation.prompts", "2",
    "--evaluation.max-tokens", "4", "--evaluation.no-greedy", "--batch-size", "1", "--epochs", "1", "--save-every", "1",
]  # fmt: skip


@contextlib.contextmanager
def full_disk():
    """Let no file of this process grow, so that the kernel rejects every write (EFBIG rather than ENOSPC)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def arguments(root, name, *options):
    return ["shiq", "--model", str(root / "model"), "--output-dir", str(root / name), *OPTIONS, *options]


def fill_disk_before(monkeypatch, owner, name, call=1):
    """Fill the disk right before the given call of a function; leaving the returned context frees it again."""
    calls, function = 0, getattr(owner, name)

    def wrapper(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == call:
            stack.enter_context(full_disk())
        return function(*args, **kwargs)

    stack = contextlib.ExitStack()
    monkeypatch.setattr(owner, name, wrapper)
    return stack


def error_message(root, name, options, capsys):
    """The last line of standard error of a run that exits with code 2."""
    with pytest.raises(SystemExit) as stop:
        train_script.main(arguments(root, name, *options))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "Traceback" not in error
    message = error.splitlines()[-1]
    assert message.startswith("train.py: ") and "File too large" in message
    return message


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("disk")
    tiny_directory(root / "model", max_positions=64, **SIZES)
    return root


def test_full_disk_at_start_leaves_no_run_directory(root, capsys):
    for name in ("run", "nested/run/directory"):
        with full_disk():
            error_message(root, name, [], capsys)
    assert [path.name for path in root.iterdir()] == ["model"]


# Where the disk fills up: owner, function, number of the call, and the path in the error message.
FAILURES = {
    "second shard of samples": (Buffer, "append", 2, "records-00001.arrow"),
    "statistics": (Buffer, "adopt_sampler_statistics", 1, "manifest.json"),
    "first metrics row": (MetricsLog, "write", 1, "run"),
    "second checkpoint": (Checkpoints, "save", 2, "run"),
    "exported weights": (huggingface, "save_file", 1, ""),
    "exported config": (huggingface, "_write_json", 1, ""),
    "learning curve": (pipeline.report, "draw_learning_curve", 1, ""),
    "summary": (pipeline, "write_json", 1, "summary.json"),
}


@pytest.mark.slow
def test_resume_after_repeated_full_disks_is_bitwise(root, capsys, monkeypatch):
    """Fail once at each entry of FAILURES, resume every time, and compare with an uninterrupted run."""
    train_script.main(arguments(root, "uninterrupted"))
    run, expected, earlier_files, resume = root / "run", root / "uninterrupted", set(), []
    for case, (owner, function, call, file) in FAILURES.items():
        with monkeypatch.context() as patch, fill_disk_before(patch, owner, function, call):
            message = error_message(root, "run", resume, capsys)
        assert file in message, (case, message)
        files = {path for pattern in ("*.arrow", "*.json", "export/*") for path in run.rglob(pattern)}
        assert earlier_files <= files and not list(run.rglob("*.tmp")), case
        earlier_files, resume = files, ["--resume"]
    train_script.main(arguments(root, "run", "--resume"))
    for name in ("export/model.safetensors", "export/config.json", "buffer/manifest.json", "weights.json"):
        assert (run / name).read_bytes() == (expected / name).read_bytes(), name
    losses = [
        [(row["step"], row["loss"]) for row in map(json.loads, (path / "metrics.jsonl").open()) if "loss" in row]
        for path in (run, expected)
    ]
    assert losses[0] == losses[1] and [step for step, _ in losses[0]] == [1, 2, 3, 4]
