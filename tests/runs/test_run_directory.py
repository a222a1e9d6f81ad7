"""Starting, resuming and discarding runs in a directory, and atomic writes of its files."""

import json
import os
from pathlib import Path

import pytest

from shiq_jax.errors import UserError
from shiq_jax.runs.run_directory import RunDirectory, write_json, write_jsonl

OPTIMIZER = {"name": "adamw", "learning_rate": 1e-3}
SETTINGS = {"task": "sorting", "seed": 1, "optimizer": OPTIMIZER, "data": Path("rows.jsonl")}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "runs" / "one"


@pytest.fixture
def run(path):
    return RunDirectory.begin(path, SETTINGS, resume=False)


def contents(directory):
    return {file.relative_to(directory): file.read_bytes() for file in directory.rglob("*") if file.is_file()}


def test_paths_are_distinct(path):
    run = RunDirectory(path)
    # With one round, the policy is the export.
    paths = [value for name, value in vars(run).items() if name not in ("path", "policy")]
    assert len(set(paths)) == len(paths) >= 10 and {value.parent for value in paths} == {path}
    assert not path.exists()


@pytest.mark.parametrize("exists", [False, True])
def test_run_starts_in_a_missing_or_empty_directory(exists, path):
    if exists:
        path.mkdir(parents=True)
    run = RunDirectory.begin(path, SETTINGS, resume=False)
    assert json.loads(run.config.read_text()) == SETTINGS | {"data": "rows.jsonl"}
    assert set(contents(path)) == {Path("config.json")}


def test_existing_run_is_not_overwritten(run, path):
    before = contents(path)
    with pytest.raises(UserError) as error:
        RunDirectory.begin(path, SETTINGS, resume=False)
    message = "already holds a run: add --resume to continue it, or choose another --output-dir"
    assert str(error.value) == f"{path} {message}"
    assert contents(path) == before


def test_directory_with_other_files_is_an_error(path):
    path.mkdir(parents=True)
    (path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError) as error:
        RunDirectory.begin(path, SETTINGS, resume=False)
    assert str(error.value) == f"{path} is not empty and holds no run: choose another --output-dir"
    assert contents(path) == {Path("thesis.txt"): b"years of work"}


@pytest.mark.parametrize("resume", [False, True])
def test_file_instead_of_directory_is_an_error(resume, tmp_path):
    (tmp_path / "file").write_text("text")
    with pytest.raises(UserError, match="holds no run"):
        RunDirectory.begin(tmp_path / "file", SETTINGS, resume=resume)
    assert (tmp_path / "file").read_text() == "text"


@pytest.mark.parametrize("exists", [False, True])
def test_resume_without_a_run_is_an_error(exists, path):
    if exists:
        path.mkdir(parents=True)
    with pytest.raises(UserError) as error:
        RunDirectory.begin(path, SETTINGS, resume=True)
    message = "holds no run to resume (it has no config.json): omit --resume to start a run"
    assert str(error.value) == f"{path} {message}"
    assert path.exists() == exists


def test_resume_with_the_same_settings(run, path):
    (path / "summary.json").write_text("{}")
    before = contents(path)
    # Settings are compared as JSON, so a path equals its string.
    resumed = RunDirectory.begin(path, dict(reversed(SETTINGS.items())) | {"data": "rows.jsonl"}, resume=True)
    assert resumed.path == path and vars(resumed) == vars(RunDirectory(path))
    assert contents(path) == before


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"seed": 2}, "seed=1, not 2"),
        ({"task": "bfcl"}, "task='sorting', not 'bfcl'"),
        ({"optimizer": {"name": "adamw", "learning_rate": 0.5}}, "optimizer.learning_rate=0.001, not 0.5"),
        ({"optimizer": None}, "optimizer={'name': 'adamw', 'learning_rate': 0.001}, not None"),
        ({"steps": 10}, "steps=None, not 10"),
    ],
)
def test_resume_with_other_settings_is_an_error(change, difference, run, path):
    before = contents(path)
    with pytest.raises(UserError) as error:
        RunDirectory.begin(path, SETTINGS | change, resume=True)
    assert str(error.value) == f"{path} was started with {difference}: resume it with the same options and data"
    assert contents(path) == before


@pytest.mark.parametrize("text", ['{"task": "sor', "", "[1, 2]", "3"])
def test_damaged_config_is_an_error(text, run, path):
    run.config.write_text(text)
    with pytest.raises(UserError) as error:
        RunDirectory.begin(path, SETTINGS, resume=True)
    assert str(error.value).startswith(f"{run.config} is not")
    assert run.config.read_text() == text


def test_changed_weights_are_an_error(run):
    for _ in range(2):
        run.record_weights("model", "ab12", "some/model")
        run.record_weights("reference", "cd34", run.reference)
    assert json.loads(run.weights.read_text()) == {"model": "ab12", "reference": "cd34"}
    before = contents(run.path)
    with pytest.raises(UserError) as error:
        RunDirectory(run.path).record_weights("model", "ef56", "some/model")
    message = f"the weights in some/model have changed since {run.path} was started: restore them, or start another run"
    assert str(error.value) == message and contents(run.path) == before


@pytest.mark.parametrize("existing", [0, 1, 2])
def test_discard_keeps_directories_that_existed_before(existing, path):
    for directory in [path.parent, path][:existing]:
        directory.mkdir(parents=True)
    run = RunDirectory.begin(path, SETTINGS, resume=False)
    run.data.mkdir()
    (run.data / "rows.jsonl").write_text("{}")
    run.discard(samples=True)
    assert [directory.exists() for directory in (path.parent, path)] == [existing > 0, existing > 1]
    assert path.parent.parent.exists() and (existing < 2 or not list(path.iterdir()))


@pytest.mark.parametrize("write", [write_json, write_jsonl])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_crash_during_a_write_keeps_the_old_file(call, write, tmp_path, monkeypatch):
    file = tmp_path / "file.json"
    write(file, [{"version": 1}])
    before = file.read_bytes()

    def crash(*_):
        raise OSError("power failure")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, crash)
        with pytest.raises(OSError, match="power"):
            write(file, [{"version": 2}])
    assert file.read_bytes() == before
    write(file, [{"version": 3}])
    assert b"3" in file.read_bytes() and [entry.name for entry in tmp_path.iterdir()] == ["file.json"]


def test_value_without_json_representation_keeps_the_old_file(tmp_path):
    file = tmp_path / "file.json"
    write_json(file, {"kept": True})
    with pytest.raises(TypeError):
        write_json(file, {"set": {1, 2}})
    assert json.loads(file.read_text()) == {"kept": True}


def test_written_values_are_read_back(tmp_path):
    value = {"text": "zwölf\n☃", "numbers": [1, 0.5, None], "nested": {"a": {}}}
    write_json(tmp_path / "one.json", value)
    assert json.loads((tmp_path / "one.json").read_text()) == value
    rows = [value, {"b": "line\u2028separator"}]
    write_jsonl(tmp_path / "many.jsonl", rows)
    assert [json.loads(line) for line in (tmp_path / "many.jsonl").read_text("utf-8").rstrip("\n").split("\n")] == rows
    write_jsonl(tmp_path / "many.jsonl", [])
    assert (tmp_path / "many.jsonl").read_bytes() == b""
