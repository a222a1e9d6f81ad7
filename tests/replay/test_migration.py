"""A buffer of schema version 1 gives the records, batches and labels that the code of that version gave."""

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
from shiq_jax.replay.labels import assign_labels, labeled_records
from shiq_jax.replay.records import FEEDBACK

V1_BUFFER = Path(__file__).parent / "buffer_v1"
EXPECTED = json.loads(V1_BUFFER.with_suffix(".json").read_text())
IDENTITY = Identity(weights="ab12", dtype="float32")
NEW = Record(tokens=[1, 2], action_mask=[0, 1], rewards=[1], group="new", chosen=True, label=True, rank=1, score=2)


def digest(batch) -> str:
    sha = hashlib.sha256()
    for leaf in jax.tree.leaves(batch):
        sha.update(f"{leaf.dtype} {leaf.shape} ".encode())
        sha.update(np.ascontiguousarray(leaf).tobytes())
    return sha.hexdigest()


@pytest.fixture
def old(tmp_path):
    """A writable copy of the version 1 buffer."""
    return Buffer.open(shutil.copytree(V1_BUFFER, tmp_path / "old"))


def files(buffer) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in buffer.path.rglob("*.arrow")}


def test_v1_records_are_read_without_feedback():
    buffer = Buffer.open(V1_BUFFER)
    assert json.loads((V1_BUFFER / "manifest.json").read_text())["schema_version"] == 1
    assert [record_to_json(buffer[number]) for number in range(len(buffer))] == EXPECTED["records"]
    for name in FEEDBACK:
        assert buffer.column(name) == [None] * len(buffer) and buffer.coverage()[name] == 0
    assert "schema version 2" in buffer.report()


@pytest.mark.parametrize("unit", EXPECTED["units"])
def test_v1_batches_are_unchanged(unit):
    """Version 1 stores preferences, ranks and labels as rewards, which give the same pairs and batches."""
    buffer, expected = Buffer.open(V1_BUFFER), EXPECTED["units"][unit]
    groups = pack_groups(buffer, unit)
    assert json.loads(json.dumps(groups)) == expected["pack_groups"] and groups.skipped == expected["left_out"]
    references = {"reference": buffer.statistics(IDENTITY)}
    packed = pack(groups, buffer, plan(buffer, groups, multiple=8), references=references)
    assert digest(packed.batch) == expected["batch"]


def test_v1_labels_are_unchanged():
    buffer = Buffer.open(V1_BUFFER)
    assert assign_labels(buffer, None).tolist() == EXPECTED["labels"]["mean"]
    assert assign_labels(buffer, 0.5).tolist() == EXPECTED["labels"]["0.5"]
    assert [record.label for record in labeled_records(buffer, 0.5, mismatched=False)] == EXPECTED["labels"]["0.5"]


def test_append_to_v1_buffer_rewrites_no_files(old):
    before, count = files(old), len(old)
    old.append([NEW])
    reopened = Buffer.open(old.path)
    assert json.loads((old.path / "manifest.json").read_text())["schema_version"] == 2
    assert (
        reopened.read(range(count)) == [record_from_json(row) for row in EXPECTED["records"]] and reopened[count] == NEW
    )
    assert reopened.column("chosen") == [None] * count + [True] and reopened.coverage()["score"] == 1
    after = files(reopened)
    assert {name: after[name] for name in before} == before and len(after) == len(before) + 1
    reopened.verify()
    reopened.write_statistics(IDENTITY, 2, [(np.zeros(1), np.zeros(1))])
    assert len(Buffer.open(old.path).statistics(IDENTITY)) == count + 1


def test_shards_of_both_versions_concatenate(old, tmp_path, make_buffer):
    merged = concatenate([old.path, make_buffer([NEW], name="new").path], tmp_path / "merged")
    records = [*old.read(range(len(old))), NEW]
    assert merged.read(range(len(merged))) == records
    assert list(from_dataset(to_dataset(merged))) == records
