"""A disk that takes nothing more, wherever a run writes: one sentence, and room again is all that it needs to go on."""

import contextlib
import json
import resource

import pytest

import train as training_door
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
def full():
    """No file of this process can grow: what the kernel then answers is not made up, only its reason is another one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def arguments(root, name, *more):
    return ["shiq", "--model", str(root / "model"), "--output-dir", str(root / name), *OPTIONS, *more]


def fill_up(monkeypatch, owner, name, call=1):
    """The disk fills up right before that call of a function."""
    calls, function = [], getattr(owner, name)

    def full_now(*args, **kwargs):
        calls.append(args)
        if len(calls) == call:
            stack.enter_context(full())
        return function(*args, **kwargs)

    stack = contextlib.ExitStack()
    monkeypatch.setattr(owner, name, full_now)
    return stack


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("disk")
    tiny_directory(root / "model", max_positions=64, **SIZES)
    return root


def test_a_run_that_finds_no_room_at_all_leaves_nothing(root, capsys):
    for place in ("fresh", "made/by/us"):
        with full(), pytest.raises(SystemExit) as stop:
            training_door.main(arguments(root, place))
        said = capsys.readouterr().err
        assert (
            stop.value.code == 2
            and said.startswith("train.py: ")
            and "cannot be written (File too large): make room" in said
        )
    assert [path.name for path in root.iterdir()] == ["model"]


# Where the disk fills up: owner, function, which call of it, and what the sentence names.
PLACES = {
    "second samples": (Buffer, "append", 2, "records-00001.arrow"),
    "statistics": (Buffer, "adopt_sampler_statistics", 1, "manifest.json"),
    "first line of the log": (MetricsLog, "write", 1, "run"),
    "second checkpoint": (Checkpoints, "save", 2, "run"),
    "weights of the export": (huggingface, "save_file", 1, ""),
    "settings of the export": (huggingface, "_write_json", 1, ""),
    "curve": (pipeline.report, "draw_learning_curve", 1, ""),
    "summary": (pipeline, "write_json", 1, "summary.json"),
}


@pytest.mark.slow
def test_the_disk_fills_up_again_and_again(root, capsys, monkeypatch):
    """Each start goes on from the one before it, and the end is that of a run that always had room."""
    training_door.main(arguments(root, "undisturbed"))
    run, whole, known, resume = root / "run", root / "undisturbed", set(), []
    for name, (owner, function, call, file) in PLACES.items():
        with monkeypatch.context() as patch, fill_up(patch, owner, function, call):
            with pytest.raises(SystemExit) as stop:
                training_door.main(arguments(root, "run", *resume))
        said = capsys.readouterr().err.splitlines()[-1]
        assert stop.value.code == 2 and said.startswith("train.py: "), name
        assert f"{file} cannot be written (File too large): make room" in said, (name, said)
        files = {path for pattern in ("*.arrow", "*.json", "export/*") for path in run.rglob(pattern)}
        assert known <= files and not list(run.rglob("*.tmp")), name
        known, resume = files, ["--resume"]
    training_door.main(arguments(root, "run", "--resume"))
    for name in ("export/model.safetensors", "export/config.json", "buffer/manifest.json", "weights.json"):
        assert (run / name).read_bytes() == (whole / name).read_bytes(), name
    losses = [
        [(row["step"], row["loss"]) for row in map(json.loads, (where / "metrics.jsonl").open()) if "loss" in row]
        for where in (run, whole)
    ]
    assert losses[0] == losses[1] and [step for step, _ in losses[0]] == [1, 2, 3, 4]
