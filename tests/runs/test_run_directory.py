"""When a run may begin or go on in a directory, and files that are whole or as they were."""

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


def test_every_file_has_its_own_name(path):
    run = RunDirectory(path)
    # With one round its policy is the export.
    places = [place for name, place in vars(run).items() if name not in ("path", "policy")]
    assert len(set(places)) == len(places) >= 10 and {place.parent for place in places} == {path}
    assert not path.exists()


@pytest.mark.parametrize("made_before", [False, True])
def test_a_run_begins_in_a_missing_or_empty_directory(made_before, path):
    if made_before:
        path.mkdir(parents=True)
    run = RunDirectory.begin(path, SETTINGS, resume=False)
    assert json.loads(run.config.read_text()) == SETTINGS | {"data": "rows.jsonl"}
    assert set(contents(path)) == {Path("config.json")}


def test_a_second_run_is_refused(run, path):
    before = contents(path)
    with pytest.raises(UserError) as refusal:
        RunDirectory.begin(path, SETTINGS, resume=False)
    expected = "holds a run already: add --resume to go on with it, or name another --output-dir"
    assert str(refusal.value) == f"{path} {expected}"
    assert contents(path) == before


def test_files_of_others_are_left_alone(path):
    path.mkdir(parents=True)
    (path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError) as refusal:
        RunDirectory.begin(path, SETTINGS, resume=False)
    assert str(refusal.value) == f"{path} is not empty and holds no run: name another --output-dir"
    assert contents(path) == {Path("thesis.txt"): b"years of work"}


@pytest.mark.parametrize("resume", [False, True])
def test_a_file_is_no_directory(resume, tmp_path):
    (tmp_path / "file").write_text("text")
    with pytest.raises(UserError, match="holds no run"):
        RunDirectory.begin(tmp_path / "file", SETTINGS, resume=resume)
    assert (tmp_path / "file").read_text() == "text"


@pytest.mark.parametrize("made_before", [False, True])
def test_nothing_to_resume_is_refused(made_before, path):
    if made_before:
        path.mkdir(parents=True)
    with pytest.raises(UserError) as refusal:
        RunDirectory.begin(path, SETTINGS, resume=True)
    expected = "holds no run to resume (it has no config.json): leave --resume out to begin one"
    assert str(refusal.value) == f"{path} {expected}"
    assert path.exists() == made_before


def test_the_same_settings_go_on(run, path):
    (path / "summary.json").write_text("{}")
    before = contents(path)
    # Equal once written down: a path is its text, a tuple its list.
    again = RunDirectory.begin(path, dict(reversed(SETTINGS.items())) | {"data": "rows.jsonl"}, resume=True)
    assert again.path == path and vars(again) == vars(RunDirectory(path))
    assert contents(path) == before


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seed": 2}, "seed=1, not 2"),
        ({"task": "bfcl"}, "task='sorting', not 'bfcl'"),
        ({"optimizer": {"name": "adamw", "learning_rate": 0.5}}, "optimizer.learning_rate=0.001, not 0.5"),
        ({"optimizer": None}, "optimizer={'name': 'adamw', 'learning_rate': 0.001}, not None"),
        ({"steps": 10}, "steps=None, not 10"),
    ],
)
def test_other_settings_are_refused_by_name(change, said, run, path):
    before = contents(path)
    with pytest.raises(UserError) as refusal:
        RunDirectory.begin(path, SETTINGS | change, resume=True)
    assert str(refusal.value) == f"{path} was begun with {said}: resume it with its own options and data"
    assert contents(path) == before


@pytest.mark.parametrize("text", ['{"task": "sor', "", "[1, 2]", "3"])
def test_a_broken_config_is_refused(text, run, path):
    run.config.write_text(text)
    with pytest.raises(UserError) as refusal:
        RunDirectory.begin(path, SETTINGS, resume=True)
    assert str(refusal.value).startswith(f"{run.config} is not")
    assert run.config.read_text() == text


def test_weights_are_those_of_the_first_time(run):
    for _ in range(2):
        run.record_weights("model", "ab12", "some/model")
        run.record_weights("reference", "cd34", run.reference)
    assert json.loads(run.weights.read_text()) == {"model": "ab12", "reference": "cd34"}
    before = contents(run.path)
    with pytest.raises(UserError) as refusal:
        RunDirectory(run.path).record_weights("model", "ef56", "some/model")
    expected = (
        f"some/model holds other weights than those that {run.path} was begun with: restore them, or begin another run"
    )
    assert str(refusal.value) == expected and contents(run.path) == before


@pytest.mark.parametrize("made_before", [0, 1, 2])
def test_a_run_that_is_discarded_leaves_the_directories_that_were_there(made_before, path):
    places = [path.parent, path][:made_before]
    for place in places:
        place.mkdir(parents=True)
    run = RunDirectory.begin(path, SETTINGS, resume=False)
    run.data.mkdir()
    (run.data / "rows.jsonl").write_text("{}")
    run.discard(samples=True)
    assert [place.exists() for place in (path.parent, path)] == [made_before > 0, made_before > 1]
    assert path.parent.parent.exists() and (made_before < 2 or not list(path.iterdir()))


@pytest.mark.parametrize("write", [write_json, write_jsonl])
@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_crash_leaves_the_old_file(step, write, tmp_path, monkeypatch):
    file = tmp_path / "file.json"
    write(file, [{"version": 1}])
    before = file.read_bytes()

    def crash(*_):
        raise OSError("the power went out")

    with monkeypatch.context() as patch:
        patch.setattr(os, step, crash)
        with pytest.raises(OSError, match="power"):
            write(file, [{"version": 2}])
    assert file.read_bytes() == before
    write(file, [{"version": 3}])
    assert b"3" in file.read_bytes() and [entry.name for entry in tmp_path.iterdir()] == ["file.json"]


def test_what_is_no_json_leaves_the_old_file(tmp_path):
    file = tmp_path / "file.json"
    write_json(file, {"kept": True})
    with pytest.raises(TypeError):
        write_json(file, {"set": {1, 2}})
    assert json.loads(file.read_text()) == {"kept": True}


def test_what_is_written_is_read(tmp_path):
    value = {"text": "zwölf\n☃", "numbers": [1, 0.5, None], "nested": {"a": {}}}
    write_json(tmp_path / "one.json", value)
    assert json.loads((tmp_path / "one.json").read_text()) == value
    rows = [value, {"b": "line\u2028separator"}]
    write_jsonl(tmp_path / "many.jsonl", rows)
    assert [json.loads(line) for line in (tmp_path / "many.jsonl").read_text("utf-8").rstrip("\n").split("\n")] == rows
    write_jsonl(tmp_path / "many.jsonl", [])
    assert (tmp_path / "many.jsonl").read_bytes() == b""
