"""TensorBoard and W&B show what the log holds, through stops and resumptions: read back without our own code."""

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
from shiq_jax.runs.trackers import require, trackers

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


def session(directory, names):
    return MetricsLog(directory.metrics, trackers(names, directory, SETTINGS))


def stopped_and_resumed(directory, *names):
    """A warm start of more steps than the passes, a stop two steps after the last checkpoint, and the rest."""
    log = session(directory, names)
    for step in range(1, 6):
        log.write("warm start", step, loss=step / 2, compiled=step == 1)
    log.write("evaluation", 0, kl=0.0)
    for step in (1, 2, 3):
        log.write("update", step, loss=step / 4, note="text")
        if step == 2:
            log.write("evaluation", 2, kl=0.25, reward=0.75)
    log.close()

    # Both name their files by the second.
    time.sleep(1.1)
    log = session(directory, names)
    log.rewind(["update", "evaluation"], 1)
    for step in (2, 3, 4):
        log.write("update", step, loss=step / 4)
        if step == 2:
            # As it comes when a stop fell between evaluation and checkpoint: dropped and made once more.
            log.write("evaluation", 2, kl=0.25, reward=0.75)
            log.rewind(["evaluation"], 1)
            log.write("evaluation", 2, kl=0.25, reward=0.75)
    log.close()
    return log.rows()


def numbers_of(rows):
    """{tag: [(step, value)]} of a log, by the rule that the pages state."""
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
    """The records of a W&B file, which is a log in the format of LevelDB, by kind."""
    from wandb.proto.wandb_internal_pb2 import Record

    found, data, at, part = {}, file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        # A block of 32 KiB ends in padding where no header fits.
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        part += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            record = Record.FromString(part)
            part = b""
            found.setdefault(record.WhichOneof("record_type"), []).append(record)
    return found


def read_wandb(directory):
    """([{key: value}], [(id, options)]) of all history and all sessions in a run directory's W&B files."""
    history, sessions = [], []
    for file in sorted(directory.wandb.glob("offline-run-*/*.wandb")):
        # W&B's own process ends a file shortly after the session has ended.
        for _ in range(100):
            if "exit" in (records := wandb_records(file)):
                break
            time.sleep(0.1)
        for record in records["history"]:
            named = ((item.key or "/".join(item.nested_key), item.value_json) for item in record.history.item)
            history.append({name: json.loads(value) for name, value in named})
        for record in records["run"]:
            options = {item.key: json.loads(item.value_json) for item in record.run.config.update}
            sessions.append((record.run.run_id, options))
    return history, sessions


def test_tensorboard_holds_the_points_of_the_log_and_none_twice(directory):
    rows = stopped_and_resumed(directory, "tensorboard")
    scalars, texts = read_tensorboard(directory.tensorboard)
    assert scalars == numbers_of(rows)
    assert [step for step, _ in scalars["warm_start/loss"]] == [1, 2, 3, 4, 5]
    assert [step for step, _ in scalars["update/loss"]] == [1, 2, 3, 4]
    assert json.loads(texts["settings/text_summary"][0][1]) == SETTINGS
    (step, text), (other, greedy) = texts["samples/00/text_summary"][0], texts["samples/01/text_summary"][0]
    assert step == other == 2 and "sort 21:" in text and "12" in text and "reward 1" in text
    assert "greedy" in greedy and "logratio -0.5" in greedy and "logratio" not in text


def test_tensorboard_begins_with_what_was_written_without_it(directory):
    log = session(directory, ())
    for step in (1, 2):
        log.write("update", step, loss=0.5)
    log = session(directory, ["tensorboard"])
    log.begin()
    log.close()
    assert read_tensorboard(directory.tensorboard)[0] == {"update/loss": [(1, 0.5), (2, 0.5)]}


def test_wandb_holds_each_line_of_the_log_once(directory):
    rows = stopped_and_resumed(directory, "wandb")
    history, runs = read_wandb(directory)
    assert [entry["_step"] for entry in history] == list(range(len(rows)))
    for entry in history:
        row = rows[entry["_step"]]
        wanted = {tag: points[0][1] for tag, points in numbers_of([row]).items()}
        stage = row["stage"].replace(" ", "_")
        assert {key: entry[key] for key in wanted} == wanted and entry[f"{stage}/step"] == row["step"]
    sizes = [
        tuple(entry[f"evaluation/generations/{size}"] for size in ("nrows", "ncols"))
        for entry in history
        if "evaluation/generations/_type" in entry
    ]
    assert sizes == [(2, len(GENERATION))]
    # Two sessions, one W&B run, which knows the options.
    known = json.loads(directory.wandb_id.read_text())
    assert {name for name, _ in runs} == {known["id"]} and len(runs) == 2 and known["rows"] == len(rows)
    assert runs[0][1]["optimizer"] == SETTINGS["optimizer"] and runs[0][1]["seed"] == 3


class Server:
    """A stand-in for W&B online, which no test can reach: it knows how many lines arrived."""

    def __init__(self, arrived):
        self.steps, self.arrived = [], arrived

    def init(self, *, id, resume, **_):
        assert resume == "allow"
        log = types.SimpleNamespace(id=id, resumed=self.arrived > 0, step=self.arrived, finish=lambda: None)
        log.log = lambda values, step, commit: self.steps.append(step)
        log.define_metric = lambda *_, **__: None
        return log

    Error, Settings = RuntimeError, dict


@pytest.mark.parametrize("arrived", [0, 2])
def test_what_the_server_lacks_is_sent_again(arrived, directory, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", Server(arrived))
    log = session(directory, ())
    for step in range(1, 5):
        log.write("update", step, loss=0.5)
    # Four lines were noted as sent; two of them were lost with the process, or nothing is known of them.
    directory.wandb_id.write_text(json.dumps({"id": "abc", "rows": 4}))
    log = session(directory, ["wandb"])
    log.write("update", 5, loss=0.5)
    assert sys.modules["wandb"].steps == ([2, 3, 4] if arrived else [4])


@pytest.mark.parametrize("name, package", [("tensorboard", "tensorboardX"), ("wandb", "wandb")])
def test_a_missing_package_is_refused_by_the_name_of_its_extra(name, package, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda wanted: None if wanted == package else find(wanted))
    with pytest.raises(UserError) as refusal:
        require([name])
    assert f"--track {name}" in str(refusal.value) and f"pip install 'shiq_jax[{name}]'" in str(refusal.value)
    require([])


def test_wandb_without_a_key_is_refused_before_anything_is_written(monkeypatch):
    import wandb

    def no_key(*_, **__):
        raise wandb.errors.UsageError("No API key configured.")

    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setattr(wandb, "login", no_key)
    with pytest.raises(UserError, match="WANDB_MODE=offline"):
        require(["wandb"])


def test_nothing_is_imported_unless_it_is_asked_for(directory, monkeypatch):
    real = builtins.__import__

    def watched(name, *args, **kwargs):
        assert name.split(".")[0] not in ("wandb", "tensorboardX", "tensorboard"), name
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", watched)
    log = session(directory, ())
    log.write("update", 1, loss=math.pi)
    log.close()
    with pytest.raises(AssertionError, match="tensorboardX"):
        session(directory, ["tensorboard"]).begin()
