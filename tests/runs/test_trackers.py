"""TensorBoard and W&B files match the log after a stop and a resumption, as read by independent code."""

import builtins
import importlib.util
import json
import math
import struct
import sys
import time
import types

import pytest

from shiq_jax.errors import UserError
from shiq_jax.runs.metrics import MetricsLog
from shiq_jax.runs.run_directory import RunDirectory, write_jsonl
from shiq_jax.runs.trackers import check_available, create_trackers

SETTINGS = {"command": "shiq", "seed": 3, "optimizer": {"learning_rate": 0.5}}
GENERATION = {"prompt": "sort 21:", "decoding": "sampled", "completion": "12", "reward": 1.0, "logratio": None}


@pytest.fixture
def directory(tmp_path):
    run = RunDirectory(tmp_path / "run")
    run.samples.mkdir(parents=True)
    write_jsonl(run.generations(2), [GENERATION, GENERATION | {"decoding": "greedy", "logratio": -0.5}])
    return run


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")


def open_log(directory, names):
    return MetricsLog(directory.metrics, create_trackers(names, directory, SETTINGS))


def stop_and_resume(directory, *names):
    """Rows of a run with a warm start, stopped two steps after its last checkpoint and resumed."""
    log = open_log(directory, names)
    for step in range(1, 6):
        log.write("warm start", step, loss=step / 2, compiled=step == 1)
    log.write("evaluation", 0, kl=0.0)
    for step in (1, 2, 3):
        log.write("update", step, loss=step / 4, note="text")
        if step == 2:
            log.write("evaluation", 2, kl=0.25, reward=0.75)
    log.close()

    # Both trackers name their files by the current second.
    time.sleep(1.1)
    log = open_log(directory, names)
    log.rewind(["update", "evaluation"], 1)
    for step in (2, 3, 4):
        log.write("update", step, loss=step / 4)
        if step == 2:
            # A run stopped between evaluation and checkpoint repeats the evaluation.
            log.write("evaluation", 2, kl=0.25, reward=0.75)
            log.rewind(["evaluation"], 1)
            log.write("evaluation", 2, kl=0.25, reward=0.75)
    log.close()
    return log.rows()


def points_of(rows):
    """Expected points of a log: tag -> [(step, value)]."""
    points = {}
    for row in rows:
        for name, value in row.items():
            if name not in ("stage", "step", "compiled", "note"):
                points.setdefault(f"{row['stage'].replace(' ', '_')}/{name}", []).append((row["step"], value))
    return points


def read_tensorboard(path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(path), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    tags = events.Tags()
    scalars = {tag: [(point.step, point.value) for point in events.Scalars(tag)] for tag in tags["scalars"]}
    texts = {
        tag: [(point.step, point.tensor_proto.string_val[0].decode()) for point in events.Tensors(tag)]
        for tag in tags["tensors"]
    }
    return scalars, texts


def wandb_records(file):
    """Record type -> records of a W&B file, which is a LevelDB log."""
    from wandb.proto.wandb_internal_pb2 import Record

    records, data, offset, payload = {}, file.read_bytes(), 7, b""
    while offset + 7 <= len(data):
        # The rest of a 32 KiB block that is too short for a header is padding.
        if (remaining := 32768 - offset % 32768) < 7:
            offset += remaining
            continue
        _, length, kind = struct.unpack("<IHB", data[offset : offset + 7])
        payload += data[offset + 7 : offset + 7 + length]
        offset += 7 + length
        # 1 is a complete record, 4 the last fragment of a record.
        if kind in (1, 4):
            record = Record.FromString(payload)
            payload = b""
            records.setdefault(record.WhichOneof("record_type"), []).append(record)
    return records


def read_wandb(directory):
    """History and sessions in a run directory's W&B files: [{key: value}], [(id, options)]."""
    history, sessions = [], []
    for file in sorted(directory.wandb.glob("offline-run-*/*.wandb")):
        # W&B's service process finishes the file shortly after the session.
        for _ in range(100):
            if "exit" in (records := wandb_records(file)):
                break
            time.sleep(0.1)
        for record in records["history"]:
            items = ((item.key or "/".join(item.nested_key), item.value_json) for item in record.history.item)
            history.append({name: json.loads(value) for name, value in items})
        for record in records["run"]:
            options = {item.key: json.loads(item.value_json) for item in record.run.config.update}
            sessions.append((record.run.run_id, options))
    return history, sessions


def test_tensorboard_points_equal_the_log(directory):
    rows = stop_and_resume(directory, "tensorboard")
    scalars, texts = read_tensorboard(directory.tensorboard)
    assert scalars == points_of(rows)
    assert [step for step, _ in scalars["warm_start/loss"]] == [1, 2, 3, 4, 5]
    assert [step for step, _ in scalars["update/loss"]] == [1, 2, 3, 4]
    assert json.loads(texts["settings/text_summary"][0][1]) == SETTINGS
    sampled_step, sampled = texts["samples/00/text_summary"][0]
    greedy_step, greedy = texts["samples/01/text_summary"][0]
    assert sampled_step == greedy_step == 2 and "sort 21:" in sampled and "12" in sampled and "reward 1" in sampled
    assert "greedy" in greedy and "logratio -0.5" in greedy and "logratio" not in sampled


def test_tensorboard_added_later_gets_all_rows(directory):
    log = open_log(directory, ())
    for step in (1, 2):
        log.write("update", step, loss=0.5)
    log = open_log(directory, ["tensorboard"])
    log.begin()
    log.close()
    assert read_tensorboard(directory.tensorboard)[0] == {"update/loss": [(1, 0.5), (2, 0.5)]}


def test_wandb_history_equals_the_log(directory):
    rows = stop_and_resume(directory, "wandb")
    history, sessions = read_wandb(directory)
    assert [entry["_step"] for entry in history] == list(range(len(rows)))
    for entry in history:
        row = rows[entry["_step"]]
        expected = {tag: points[0][1] for tag, points in points_of([row]).items()}
        stage = row["stage"].replace(" ", "_")
        assert {key: entry[key] for key in expected} == expected and entry[f"{stage}/step"] == row["step"]
    sizes = [
        tuple(entry[f"evaluation/generations/{size}"] for size in ("nrows", "ncols"))
        for entry in history
        if "evaluation/generations/_type" in entry
    ]
    assert sizes == [(2, len(GENERATION))]
    # Two sessions of one W&B run with the options of the run.
    progress = json.loads(directory.wandb_id.read_text())
    assert {name for name, _ in sessions} == {progress["id"]} and len(sessions) == 2
    assert progress["rows"] == len(rows)
    assert sessions[0][1]["optimizer"] == SETTINGS["optimizer"] and sessions[0][1]["seed"] == 3


class FakeWandb:
    """Fake of the wandb module online, with a server that received some lines."""

    def __init__(self, received):
        self.steps, self.received = [], received

    def init(self, *, id, resume, **_):
        assert resume == "allow"
        run = types.SimpleNamespace(id=id, resumed=self.received > 0, step=self.received, finish=lambda: None)
        run.log = lambda values, step, commit: self.steps.append(step)
        run.define_metric = lambda *_, **__: None
        return run

    Error, Settings = RuntimeError, dict


@pytest.mark.parametrize("received", [0, 2])
def test_lines_missing_on_the_server_are_sent_again(received, directory, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb(received))
    log = open_log(directory, ())
    for step in range(1, 5):
        log.write("update", step, loss=0.5)
    # Four lines are recorded as sent, but the server may have received fewer.
    directory.wandb_id.write_text(json.dumps({"id": "abc", "rows": 4}))
    log = open_log(directory, ["wandb"])
    log.write("update", 5, loss=0.5)
    assert sys.modules["wandb"].steps == ([2, 3, 4] if received else [4])


@pytest.mark.parametrize("name, package", [("tensorboard", "tensorboardX"), ("wandb", "wandb")])
def test_missing_package_error_names_the_extra(name, package, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None if module == package else find(module))
    with pytest.raises(UserError) as error:
        check_available([name])
    assert f"--track {name}" in str(error.value) and f"pip install 'shiq_jax[{name}]'" in str(error.value)
    check_available([])


def test_wandb_without_an_api_key_is_an_error(monkeypatch):
    import wandb

    def no_key(*_, **__):
        raise wandb.errors.UsageError("No API key configured.")

    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setattr(wandb, "login", no_key)
    with pytest.raises(UserError, match="WANDB_MODE=offline"):
        check_available(["wandb"])


def test_tracker_packages_are_imported_only_on_request(directory, monkeypatch):
    original_import = builtins.__import__

    def checked_import(name, *args, **kwargs):
        assert name.split(".")[0] not in ("wandb", "tensorboardX", "tensorboard"), name
        return original_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", checked_import)
    log = open_log(directory, ())
    log.write("update", 1, loss=math.pi)
    log.close()
    with pytest.raises(AssertionError, match="tensorboardX"):
        open_log(directory, ["tensorboard"]).begin()
