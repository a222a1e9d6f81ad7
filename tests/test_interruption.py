"""Runs that are stopped, killed or started twice: what is on disk goes on, and ends as if nothing had happened."""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import train as training_door
from experiments import interruption
from shiq_jax import stopping
from shiq_jax.errors import UserError
from shiq_jax.replay import storage
from shiq_jax.replay.locks import exclusive
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
    """Few records in several shards, as many records are."""
    before, storage.SHARD_ROWS = storage.SHARD_ROWS, 8
    yield
    storage.SHARD_ROWS = before


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """Arguments of a job that samples, of one that annotates given rows in several shards, and of one in rounds."""
    made = interruption.prepare(tmp_path_factory.mktemp("inputs"))
    data = [*made["data"], "--epochs", "0.5"]
    rounds = [*SMALL, "--epochs", "1", "--rounds", "3"]
    return {"sampled": [*made["sampled"][:3], *SMALL], "data": data, "rounds": [*made["rounds"][:3], *rounds]}


def run(arguments, out, *more):
    training_door.main([*arguments, "--output-dir", str(out), *more])


@pytest.fixture(scope="module")
def whole(jobs, tmp_path_factory):
    """(undisturbed run, images of its directory as a kill would have left it) of a job; made once."""
    made = {}

    def get(name):
        if name not in made:
            out = tmp_path_factory.mktemp("whole") / name
            images = tmp_path_factory.mktemp("images")
            with interruption.watching(out, Photographer(out, images)):
                run(jobs[name], out)
            made[name] = out, sorted(images.iterdir())
        return made[name]

    return get


class Photographer:
    """Copies a directory just before some of the changes of it: the first in every part, and random ones."""

    def __init__(self, directory, images, share=0.05):
        self.directory, self.images, self.share = directory, images, share
        self.random, self.lock, self.seen, self.count = random.Random(0), threading.Lock(), set(), 0

    def __call__(self, path):
        with self.lock:
            self.count += 1
            part = "/".join(Path(path).parts[: 4 if path.startswith("rounds") else 2])
            wanted = part not in self.seen or self.random.random() < self.share
            self.seen.add(part)
            if wanted and (self.directory / "config.json").exists():
                self.copy(self.images / f"{self.count:05d}")

    def copy(self, image):
        for _ in range(20):
            # Files that another thread renames meanwhile make it begin again.
            with contextlib.suppress(shutil.Error, FileNotFoundError):
                shutil.copytree(self.directory, image)
                return
            shutil.rmtree(image, ignore_errors=True)


# ---- killed ----


def resume_images(name, jobs, whole, tmp_path, count, seed):
    """What differs between the whole run and those that go on from some of its images; empty where nothing does."""
    out, images = whole(name)
    found = {}
    for number, image in enumerate(random.Random(seed).sample(images, count)):
        here = tmp_path / image.name
        shutil.copytree(image, here)
        if number % 2 and (here / "metrics.jsonl").exists():
            # Killed in the middle of a line.
            with (here / "metrics.jsonl").open("a") as file:
                file.write('{"stage": "update", "ste')
        run(jobs[name], here, "--resume")
        if different := interruption.differences(here, out):
            found[image.name] = different
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sampled", "data", "rounds"])
def test_what_a_kill_leaves_goes_on_to_the_same_end(name, jobs, whole, tmp_path):
    assert resume_images(name, jobs, whole, tmp_path, 2, seed=1) == {}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sampled", "data", "rounds"])
def test_whatever_a_kill_leaves_goes_on_to_the_same_end(name, jobs, whole, tmp_path):
    assert resume_images(name, jobs, whole, tmp_path, 6, seed=2) == {}


@pytest.mark.slow
def test_kills_in_earnest(tmp_path):
    """Real processes and real SIGKILLs; the experiment stops with an error when a run ends otherwise."""
    options = interruption.Options(kills=1, seed=3, runs=tmp_path / "runs", jobs=("rounds",))
    interruption.main(options)
    page = (tmp_path / "runs" / "page" / "interruption.md").read_text()
    assert "Of 1 runs" in page and page.count("| yes |") == 1


# ---- asked to stop ----


def asks(number, at, function):
    """The function, but the process gets a signal when it is called in a way that `at` is waiting for."""

    def call(*args, **kwargs):
        if at(*args, **kwargs):
            os.kill(os.getpid(), number)
        return function(*args, **kwargs)

    return call


def at_update(stage, step):
    """When the metrics of an update arrive: the next one is running, unless something waits for the state."""
    return lambda callback, done: (callback.name, done.step) == (stage, step)


# Where the signal comes, and what the run then says; in the order in which a run gets there.
STOPS = {
    "sampled": [
        (CheckFinite, "on_update", at_update("warm start", 2), "stopped at warm start 2 of 3"),
        (sampling, "collect_records", lambda *_, first, **__: first == 0, "stopped after 8 of 16 samples"),
        (evaluation, "collect_records", lambda *_, **__: True, "stopped while evaluating"),
        (CheckFinite, "on_update", at_update("update", 1), "stopped at update 2 of 6"),
        (CheckFinite, "on_update", at_update("update", 3), "stopped at update 3 of 6"),
        (reference, "record_statistics", lambda *_, **__: True, "stopped at update 3 of 6"),
    ],
    "data": [(CheckFinite, "on_update", at_update("update", 2), "stopped at update 2 of")],
}


@pytest.mark.parametrize("name", STOPS)
def test_a_run_that_is_asked_to_stop_saves_and_says_how_to_go_on(name, jobs, whole, tmp_path, monkeypatch, capsys):
    """One run, stopped again and again and each time resumed: no stop leaves a trace in what it ends with."""
    out, more = tmp_path / "run", ()
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    for module, function, at, said in STOPS[name]:
        with monkeypatch.context() as patch:
            patch.setattr(module, function, asks(signal.SIGTERM, at, getattr(module, function)))
            run(jobs[name], out, *more)
        error = capsys.readouterr().err
        assert f"train.py: {said}" in error and error.endswith("; the same command with --resume goes on\n"), error
        if "update" in said:
            step = said.split()[3]
            assert (out / "checkpoints" / step).is_dir(), said
        assert not (out / "export").exists() and not (out / "summary.json").exists()
        more = ("--resume",)
    assert {number: signal.getsignal(number) for number in before} == before
    run(jobs[name], out, *more)
    assert interruption.differences(out, whole(name)[0]) == []


def test_annotation_that_was_stopped_goes_on_shard_by_shard(jobs, whole, tmp_path, monkeypatch):
    """The shards that are left are padded like all of them, though the widest of them may be done already."""
    from shiq_jax.replay import Buffer
    from shiq_jax.training import annotation

    compute, shapes = annotation._pack_group_statistics, []

    def spied(model, params, trees, pack_groups, shape, *options):
        # Evaluations compute statistics of lists of samples.
        if isinstance(trees.records, Buffer):
            shapes.append(shape)
            if len(shapes) == 3:
                os.kill(os.getpid(), signal.SIGTERM)
        return compute(model, params, trees, pack_groups, shape, *options)

    monkeypatch.setattr(annotation, "_pack_group_statistics", spied)
    run(jobs["data"], tmp_path / "run")
    ((_, shards),) = Buffer.open(tmp_path / "run" / "buffer").identities()
    total = len(Buffer.open(tmp_path / "run" / "buffer").shards)
    assert shards == [0, 1] and total > 4
    run(jobs["data"], tmp_path / "run", "--resume")
    assert len(shapes) == total + 1 and len(set(shapes)) == 1
    assert interruption.differences(tmp_path / "run", whole("data")[0]) == []


@pytest.mark.parametrize("times, said", [(1, "stopped at warm start 2 of 3"), (2, "interrupted")])
def test_an_interrupt_stops_after_the_step_and_a_second_at_once(times, said, jobs, tmp_path, monkeypatch, capfd):
    check = CheckFinite.on_update

    def interrupt(callback, done):
        for _ in range(times if done.step == 1 else 0):
            os.kill(os.getpid(), signal.SIGINT)
        check(callback, done)

    monkeypatch.setattr(CheckFinite, "on_update", interrupt)
    with pytest.raises(SystemExit) as stop:
        run(jobs["sampled"], tmp_path / "run")
    assert stop.value.code == 130
    error = capfd.readouterr().err
    assert "interrupt again to stop immediately" in error
    assert error.endswith(f"train.py: {said}; the same command with --resume goes on\n")
    assert (tmp_path / "run" / "warm_start" / "checkpoints" / "2").is_dir() == (times == 1)


def test_nobody_who_did_not_ask_is_stopped():
    stopping.check("here")
    with stopping.stop_on_signals():
        assert not stopping.requested()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stopping.requested()
        with pytest.raises(stopping.Stopped, match="^stopped here$"):
            stopping.check("here")
    assert not stopping.requested()


def test_other_threads_leave_signals_alone():
    before, found = signal.getsignal(signal.SIGTERM), []

    def work():
        with stopping.stop_on_signals():
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [before]


# ---- two at once ----


HOLD = """
import sys, time
from pathlib import Path
from shiq_jax.runs.run_directory import RunDirectory
with RunDirectory(Path(sys.argv[1])).locked():
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_second_process_is_refused_and_the_kernel_lets_go_of_a_killed_one(tmp_path):
    run = RunDirectory.begin(tmp_path / "run", {"seed": 1}, resume=False)
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(run.path)], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError) as refused, run.locked():
            raise AssertionError("both hold the run")
        said = f"another process is at work in {run.path}: wait until it has ended, or name another --output-dir"
        assert str(refused.value) == said
    finally:
        holder.kill()
        holder.wait()
    with run.locked():
        assert [path.name for path in run.path.iterdir()] == ["config.json"]


def test_a_run_that_somebody_is_at_work_on_is_left_alone(jobs, whole, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(whole("sampled")[1][-1], out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with RunDirectory(out).locked(), pytest.raises(SystemExit) as stop:
        run(jobs["sampled"], out, "--resume")
    assert stop.value.code == 2 and "another process is at work in" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_only_one_of_two_begins(tmp_path):
    """Both find an empty directory; the slower one does not replace what the faster one has begun."""
    first, second = (RunDirectory(tmp_path / "run") for _ in range(2))
    first.path.mkdir()
    first._claim({"seed": 1})
    with pytest.raises(UserError, match="holds a run already"):
        second._claim({"seed": 2})
    assert '"seed": 1' in first.config.read_text() and list(first.path.iterdir()) == [first.config]


def test_what_a_killed_beginning_left_is_no_obstacle(tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "config.json.1234abcd.tmp").write_text("{")
    with RunDirectory.begin(out, {"seed": 1}, resume=False).locked():
        assert [path.name for path in out.iterdir()] == ["config.json"]


def test_a_lock_outlives_the_removal_of_its_file(tmp_path):
    """Whoever opened the old file before it was removed holds nothing; it tries again with the file of today."""
    file, order = tmp_path / "lock", []

    def late():
        with exclusive(file, create=True, waiting=lambda: order.append("waiting")) as held:
            order.append(held and file.exists())

    with exclusive(file, create=True):
        thread = threading.Thread(target=late)
        thread.start()
        while not order:
            pass
        file.unlink()
    thread.join()
    assert order == ["waiting", True]
    file.unlink()
    with pytest.raises(FileNotFoundError), exclusive(file):
        pass
