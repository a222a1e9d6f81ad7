"""A buffer of schema version 1, and what the code of that version read, drew and packed from it."""

import hashlib
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from shiq_jax.replay import (
    Buffer,
    Identity,
    Record,
    concatenate,
    from_dataset,
    pack,
    pack_groups,
    plan,
    record_from_json,
    record_to_json,
    to_dataset,
)
from shiq_jax.replay.labels import labelled, labels
from shiq_jax.replay.records import JUDGEMENTS

OLD = Path(__file__).parent / "buffer_v1"
EXPECTED = json.loads(OLD.with_suffix(".json").read_text())
IDENTITY = Identity(weights="ab12", dtype="float32")
NEW = Record(tokens=[1, 2], action_mask=[0, 1], rewards=[1], group="new", chosen=True, label=True, rank=1, score=2)


def digest(batch) -> str:
    total = hashlib.sha256()
    for leaf in jax.tree.leaves(batch):
        total.update(f"{leaf.dtype} {leaf.shape} ".encode())
        total.update(np.ascontiguousarray(leaf).tobytes())
    return total.hexdigest()


@pytest.fixture
def old(tmp_path):
    """A copy that may be written to."""
    return Buffer.open(shutil.copytree(OLD, tmp_path / "old"))


def files(buffer) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in buffer.path.rglob("*.arrow")}


def test_its_records_are_read_without_what_they_did_not_say():
    buffer = Buffer.open(OLD)
    assert json.loads((OLD / "manifest.json").read_text())["schema_version"] == 1
    assert [record_to_json(buffer[number]) for number in range(len(buffer))] == EXPECTED["records"]
    for name in JUDGEMENTS:
        assert buffer.column(name) == [None] * len(buffer) and buffer.coverage()[name] == 0
    assert "schema version 2" in buffer.report()


@pytest.mark.parametrize("unit", EXPECTED["units"])
def test_batches_are_those_of_the_old_code(unit):
    """Preferences, ranks and labels of version 1 are rewards, and give the same pairs and the same bytes."""
    buffer, expected = Buffer.open(OLD), EXPECTED["units"][unit]
    drawn = pack_groups(buffer, unit)
    assert json.loads(json.dumps(drawn)) == expected["bundles"] and drawn.left_out == expected["left_out"]
    references = {"reference": buffer.statistics(IDENTITY)}
    packed = pack(drawn, buffer, plan(buffer, drawn, multiple=8), references=references)
    assert digest(packed.batch) == expected["batch"]


def test_labels_are_those_of_the_old_code():
    buffer = Buffer.open(OLD)
    assert labels(buffer, None).tolist() == EXPECTED["labels"]["mean"]
    assert labels(buffer, 0.5).tolist() == EXPECTED["labels"]["0.5"]
    assert [record.label for record in labelled(buffer, 0.5, mismatched=False)] == EXPECTED["labels"]["0.5"]


def test_it_grows_without_a_file_being_rewritten(old):
    before, count = files(old), len(old)
    old.append([NEW])
    again = Buffer.open(old.path)
    assert json.loads((old.path / "manifest.json").read_text())["schema_version"] == 2
    assert again.read(range(count)) == [record_from_json(row) for row in EXPECTED["records"]] and again[count] == NEW
    assert again.column("chosen") == [None] * count + [True] and again.coverage()["score"] == 1
    after = files(again)
    assert {name: after[name] for name in before} == before and len(after) == len(before) + 1
    again.verify()
    again.write_statistics(IDENTITY, 2, [(np.zeros(1), np.zeros(1))])
    assert len(Buffer.open(old.path).statistics(IDENTITY)) == count + 1


def test_old_and_new_shards_make_one_buffer_and_one_dataset(old, tmp_path, make_buffer):
    merged = concatenate([old.path, make_buffer([NEW], name="new").path], tmp_path / "merged")
    records = [*old.read(range(len(old))), NEW]
    assert merged.read(range(len(merged))) == records
    assert list(from_dataset(to_dataset(merged))) == records
