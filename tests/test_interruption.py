"""Stopped and killed runs resume bitwise, and a run directory is used by one process at a time."""

import contextlib
import functools
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import train as train_script
from experiments import interruption
from shiq_jax import stopping
from shiq_jax.errors import UserError
from shiq_jax.replay import storage
from shiq_jax.replay.locks import exclusive_lock
from shiq_jax.runs import sampling
from shiq_jax.runs.run_directory import RunDirectory
from shiq_jax.training import evaluation, reference
from shiq_jax.training.callbacks import CheckFinite

ROOT = Path(__file__).parent.parent
SMALL = [
    "--mesh", "fsdp=1", "--warm-start.steps", "3", "--warm-start.batch-size", "8", "--warm-start.demonstrations", "16",
    "--collection.prompts", "8", "--collection.prompts-per-batch", "4", "--collection.samples-per-prompt", "2",
    "--collection.sampling.max-tokens", "4", "--evaluation.prompts", "4", "--evaluation.samples-per-prompt", "1",
    "--evaluation.max-tokens", "4", "--evaluation.times", "2", "--evaluation.no-greedy", "--batch-size", "4",
    "--epochs", "3", "--save-every", "2",
]  # fmt: skip


pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module", autouse=True)
def small_shards():
    """Store at most 8 records per shard, so that a small buffer has several shards."""
    default, storage.SHARD_ROWS = storage.SHARD_ROWS, 8
    yield
    storage.SHARD_ROWS = default


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """Arguments of three jobs: one samples its buffer, one annotates given data, one trains in rounds."""
    arguments = interruption.prepare(tmp_path_factory.mktemp("inputs"))
    return {
        "sampled": [*arguments["sampled"][:3], *SMALL],
        "data": [*arguments["data"], "--epochs", "0.5"],
        "rounds": [*arguments["rounds"][:3], *SMALL, "--epochs", "1", "--rounds", "3"],
    }


def train(arguments, output_dir, *options):
    train_script.main([*arguments, "--output-dir", str(output_dir), *options])


@pytest.fixture(scope="module")
def uninterrupted(jobs, tmp_path_factory):
    """Return a function that trains a job once and returns its run directory and snapshots taken during the run."""

    @functools.cache
    def train_with_snapshots(job):
        run, snapshots = tmp_path_factory.mktemp("uninterrupted") / job, tmp_path_factory.mktemp("snapshots")
        with interruption.watching(run, SnapshotTaker(run, snapshots)):
            train(jobs[job], run)
        return run, sorted(snapshots.iterdir())

    return train_with_snapshots


class SnapshotTaker:
    """Copies a directory before the first change in each subdirectory and before a random share of the others."""

    def __init__(self, directory, snapshots, share=0.05):
        self.directory, self.snapshots, self.share = directory, snapshots, share
        self.random, self.lock, self.seen, self.count = random.Random(0), threading.Lock(), set(), 0

    def __call__(self, path):
        with self.lock:
            self.count += 1
            subdirectory = "/".join(Path(path).parts[: 4 if path.startswith("rounds") else 2])
            selected = subdirectory not in self.seen or self.random.random() < self.share
            self.seen.add(subdirectory)
            if selected and (self.directory / "config.json").exists():
                self.copy_to(self.snapshots / f"{self.count:05d}")

    def copy_to(self, snapshot):
        # Retry, because another thread may rename files during the copy.
        for _ in range(20):
            with contextlib.suppress(shutil.Error, FileNotFoundError):
                shutil.copytree(self.directory, snapshot)
                return
            shutil.rmtree(snapshot, ignore_errors=True)


# ---- kills ----


def differences_after_resume(job, jobs, uninterrupted, tmp_path, count, seed):
    """Resume from random snapshots; return how the finished runs differ from the uninterrupted one, by snapshot."""
    expected, snapshots = uninterrupted(job)
    differences = {}
    for number, snapshot in enumerate(random.Random(seed).sample(snapshots, count)):
        run = tmp_path / snapshot.name
        shutil.copytree(snapshot, run)
        if number % 2 and (run / "metrics.jsonl").exists():
            # A kill can truncate the last line.
            with (run / "metrics.jsonl").open("a") as file:
                file.write('{"stage": "update", "ste')
        train(jobs[job], run, "--resume")
        if result := interruption.differences(run, expected):
            differences[snapshot.name] = result
    return differences


@pytest.mark.slow
@pytest.mark.parametrize("count, seed", [(6, 2)])
@pytest.mark.parametrize("job", ["sampled", "data", "rounds"])
def test_resume_after_a_kill_is_bitwise(job, count, seed, jobs, uninterrupted, tmp_path):
    assert differences_after_resume(job, jobs, uninterrupted, tmp_path, count, seed) == {}


@pytest.mark.slow
def test_resume_after_sigkill_of_a_process_is_bitwise(tmp_path):
    """Run the experiment with one SIGKILL; it raises if the resumed run differs."""
    options = interruption.Options(kills=1, seed=3, runs=tmp_path / "runs", jobs=("rounds",))
    interruption.main(options)
    page = (tmp_path / "runs" / "page" / "interruption.md").read_text()
    assert "Of 1 runs" in page and page.count("| yes |") == 1


# ---- signals ----


def with_signal(function, condition):
    """Wrap a function to send SIGTERM to this process before a call whose arguments satisfy `condition`."""

    def wrapper(*args, **kwargs):
        if condition(*args, **kwargs):
            os.kill(os.getpid(), signal.SIGTERM)
        return function(*args, **kwargs)

    return wrapper


def at_update(stage, step):
    """Condition for `CheckFinite.on_update`, which receives the metrics of a step while the next one may be running."""
    return lambda callback, done: (callback.name, done.step) == (stage, step)


# When SIGTERM arrives (owner, function, condition), in the order of a run; the progress that the message reports; and
# the step of the checkpoint that the run saves before it stops.
STOPS = {
    "sampled": [
        (CheckFinite, "on_update", at_update("warm start", 2), "warm start 2 of 3", None),
        (sampling, "collect_records", lambda *_, first, **__: first == 0, "8 of 16 samples", None),
        (evaluation, "collect_records", lambda *_, **__: True, "evaluating", None),
        (CheckFinite, "on_update", at_update("update", 1), "update 2 of 6", 2),
        (CheckFinite, "on_update", at_update("update", 3), "update 3 of 6", 3),
        (reference, "record_statistics", lambda *_, **__: True, "update 3 of 6", 3),
    ],
    "data": [(CheckFinite, "on_update", at_update("update", 2), "update 2 of", 2)],
}


@pytest.mark.slow
@pytest.mark.parametrize("job", STOPS)
def test_resume_after_repeated_sigterm_is_bitwise(job, jobs, uninterrupted, tmp_path, monkeypatch, capsys):
    run, resume = tmp_path / "run", ()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    for owner, function, condition, progress, checkpoint in STOPS[job]:
        with monkeypatch.context() as patch:
            patch.setattr(owner, function, with_signal(getattr(owner, function), condition))
            train(jobs[job], run, *resume)
        message = capsys.readouterr().err.splitlines()[-1]
        assert message.startswith("train.py: ") and progress in message and "--resume" in message, message
        assert checkpoint is None or (run / "checkpoints" / str(checkpoint)).is_dir(), progress
        assert not (run / "export").exists() and not (run / "summary.json").exists()
        resume = ("--resume",)
    assert {number: signal.getsignal(number) for number in handlers} == handlers
    train(jobs[job], run, *resume)
    assert interruption.differences(run, uninterrupted(job)[0]) == []


@pytest.mark.slow
def test_resumed_annotation_keeps_complete_shards_and_padding(jobs, uninterrupted, tmp_path, monkeypatch):
    """All shards are padded to one shape, also when the shard with the longest rows is already complete."""
    from shiq_jax.replay import Buffer
    from shiq_jax.training import annotation

    compute, shapes = annotation._pack_group_statistics, []

    def recording(model, params, trees, pack_groups, shape, *options):
        # Evaluation passes lists of samples through the same function.
        if isinstance(trees.records, Buffer):
            shapes.append(shape)
            if len(shapes) == 3:
                os.kill(os.getpid(), signal.SIGTERM)
        return compute(model, params, trees, pack_groups, shape, *options)

    monkeypatch.setattr(annotation, "_pack_group_statistics", recording)
    train(jobs["data"], tmp_path / "run")
    buffer = Buffer.open(tmp_path / "run" / "buffer")
    ((_, annotated),) = buffer.identities()
    assert annotated == [0, 1] and len(buffer.shards) > 4
    train(jobs["data"], tmp_path / "run", "--resume")
    assert len(shapes) == len(buffer.shards) + 1 and len(set(shapes)) == 1
    assert interruption.differences(tmp_path / "run", uninterrupted("data")[0]) == []


@pytest.mark.parametrize("interrupts, fragment", [(1, "warm start 2 of 3"), (2, "interrupted")])
def test_first_sigint_finishes_the_step_and_second_stops_at_once(
    interrupts, fragment, jobs, tmp_path, monkeypatch, capfd
):
    on_update = CheckFinite.on_update

    def interrupt(callback, done):
        for _ in range(interrupts if done.step == 1 else 0):
            os.kill(os.getpid(), signal.SIGINT)
        on_update(callback, done)

    monkeypatch.setattr(CheckFinite, "on_update", interrupt)
    with pytest.raises(SystemExit) as stop:
        train(jobs["sampled"], tmp_path / "run")
    assert stop.value.code == 130
    error = capfd.readouterr().err
    message = error.splitlines()[-1]
    assert "interrupt again" in error
    assert message.startswith("train.py: ") and fragment in message and "--resume" in message
    assert (tmp_path / "run" / "warm_start" / "checkpoints" / "2").is_dir() == (interrupts == 1)


def test_check_raises_only_after_a_signal():
    stopping.check("here")
    with stopping.stop_on_signals():
        assert not stopping.requested()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stopping.requested()
        with pytest.raises(stopping.Stopped, match="here"):
            stopping.check("here")
    assert not stopping.requested()


def test_on_signals_installs_no_handlers_in_other_threads():
    before, inside = signal.getsignal(signal.SIGTERM), []

    def enter():
        with stopping.stop_on_signals():
            inside.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert inside == [before]


# ---- concurrent processes ----


HOLD_LOCK = """
import sys, time
from pathlib import Path
from shiq_jax.runs.run_directory import RunDirectory
with RunDirectory(Path(sys.argv[1])).locked():
    print("locked", flush=True)
    time.sleep(600)
"""


def test_lock_excludes_a_second_process_until_the_holder_is_killed(tmp_path):
    run = RunDirectory.begin(tmp_path / "run", {"seed": 1}, resume=False)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD_LOCK, str(run.path)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    try:
        assert holder.stdout.readline() == "locked\n"
        with pytest.raises(UserError) as caught, run.locked():
            raise AssertionError("both processes hold the lock")
        message = str(caught.value)
        assert "another process" in message and str(run.path) in message and "--output-dir" in message
    finally:
        holder.kill()
        holder.wait()
    with run.locked():
        assert [path.name for path in run.path.iterdir()] == ["config.json"]


def test_resume_of_a_locked_run_changes_nothing(jobs, uninterrupted, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(uninterrupted("sampled")[1][-1], run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with RunDirectory(run).locked(), pytest.raises(SystemExit) as stop:
        train(jobs["sampled"], run, "--resume")
    assert stop.value.code == 2 and "another process" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_concurrent_starts_create_one_run(tmp_path):
    """Both processes find an empty directory, and the second one keeps the config.json of the first."""
    first, second = (RunDirectory(tmp_path / "run") for _ in range(2))
    first.path.mkdir()
    first._create_config({"seed": 1})
    with pytest.raises(UserError, match="--resume"):
        second._create_config({"seed": 2})
    assert '"seed": 1' in first.config.read_text() and list(first.path.iterdir()) == [first.config]


def test_temporary_files_of_a_killed_start_are_removed(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json.1234abcd.tmp").write_text("{")
    with RunDirectory.begin(run, {"seed": 1}, resume=False).locked():
        assert [path.name for path in run.iterdir()] == ["config.json"]


def test_waiting_for_a_lock_whose_file_is_removed(tmp_path):
    file, order = tmp_path / "lock", []

    def wait_for_lock():
        with exclusive_lock(file, create=True, on_wait=lambda: order.append("waiting")) as locked:
            order.append(locked and file.exists())

    with exclusive_lock(file, create=True):
        thread = threading.Thread(target=wait_for_lock)
        thread.start()
        while not order:
            pass
        file.unlink()
    thread.join()
    assert order == ["waiting", True]
    file.unlink()
    with pytest.raises(FileNotFoundError), exclusive_lock(file):
        pass
