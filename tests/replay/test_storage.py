import errno
import os

import numpy as np
import pyarrow as pa
import pytest

from shiq_jax.errors import UserError
from shiq_jax.replay import storage
from shiq_jax.replay.records import STATISTICS


def test_a_failed_write_leaves_the_old_content(tmp_path):
    path = tmp_path / "file"
    storage.write_atomically(path, lambda file: file.write(b"old"))

    def fails(file):
        file.write(b"half of the n")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError):
        storage.write_atomically(path, fails)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_told_with_the_file(tmp_path):
    def fails(file):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError) as told:
        storage.write_atomically(tmp_path / "file", fails)
    assert told.value.errno == errno.ENOSPC and told.value.filename == str(tmp_path / "file")
    assert not list(tmp_path.iterdir())


def test_bytes_are_synchronised_before_the_name_changes(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (events.append("fsync"), fsync(descriptor)))
    monkeypatch.setattr(os, "replace", lambda *names: (events.append("replace"), replace(*names)))
    assert storage.write_atomically(tmp_path / "file", lambda file: file.write(b"12345")) == 5
    assert events == ["fsync", "replace", "fsync"]


def annotations(path, rows=3):
    columns = {
        "logp": [np.full(k, -k, np.float32) for k in range(rows)],
        "lse": [np.zeros(k, np.float32) for k in range(rows)],
    }
    return storage.write_shard(path, storage.ANNOTATIONS, columns)


def test_shards_are_plain_arrow_streams_with_one_batch(tmp_path):
    written = annotations(tmp_path / "shard.arrow")
    with pa.OSFile(str(tmp_path / "shard.arrow")) as file:
        batches = list(pa.ipc.open_stream(file))
    assert len(batches) == 1 and batches[0].to_pydict()["logp"] == [[], [-1.0], [-2.0, -2.0]]
    assert written["bytes"] == (tmp_path / "shard.arrow").stat().st_size and written["rows"] == 3


def test_null_empty_and_full_rows_are_told_apart(tmp_path):
    rows = [None, np.zeros(0, np.float32), np.ones(3, np.float32), None]
    columns = {name: rows for name in STATISTICS}
    columns |= {"tokens": [np.arange(2, dtype=np.int32)] * 4, "rewards": [np.ones(1, np.float32)] * 4}
    columns |= {
        "action_mask": [np.array([False, True])] * 4,
        "group": ["g"] * 4,
        "prompt": [None, "", "ü", None],
        "user": [None] * 4,
        "chosen": [True, None, False, None],
        "label": [None] * 4,
        "rank": [1.0, 2.0, None, 0.0],
        "score": [None] * 4,
    }
    storage.write_shard(tmp_path / "shard.arrow", storage.RECORDS, columns)
    shard = storage.Shard(tmp_path / "shard.arrow", storage.RECORDS, 4)
    read = [shard.get("logp", row) for row in range(4)]
    assert read[0] is None and read[3] is None and read[1].size == 0 and read[2].tolist() == [1, 1, 1]
    assert [shard.value("prompt", row) for row in range(4)] == [None, "", "ü", None]
    assert shard.values("chosen") == [True, None, False, None] and shard.values("rank") == [1.0, 2.0, None, 0.0]
    assert (shard.present("logp"), shard.present("user"), shard.present("rewards")) == (2, 0, 4)
    np.testing.assert_array_equal(shard.sums("lse"), [0, 0, 3, 0])


def test_masks_are_read_at_any_bit(tmp_path):
    rng = np.random.default_rng(0)
    masks = [rng.random(size) < 0.5 for size in (1, 7, 8, 9, 0, 31, 64, 3)]
    count = len(masks)
    columns = {field.name: [None] * count for field in storage.RECORDS}
    columns |= {"tokens": [np.zeros(len(mask), np.int32) for mask in masks], "action_mask": masks}
    columns |= {"rewards": [np.zeros(0, np.float32)] * count, "group": ["g"] * count}
    storage.write_shard(tmp_path / "shard.arrow", storage.RECORDS, columns)
    shard = storage.Shard(tmp_path / "shard.arrow", storage.RECORDS, count)
    for row, mask in enumerate(masks):
        np.testing.assert_array_equal(shard.get("action_mask", row), mask)


@pytest.mark.parametrize("keep", [0, 5, 100, 400])
def test_truncated_shards_are_refused_by_name(tmp_path, keep):
    path = tmp_path / "shard.arrow"
    annotations(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match="shard.arrow is truncated or corrupt"):
        storage.Shard(path, storage.ANNOTATIONS, 3)


def test_other_schemas_row_counts_and_missing_files_are_refused_by_name(tmp_path):
    path = tmp_path / "shard.arrow"
    annotations(path)
    with pytest.raises(UserError, match="shard.arrow holds the columns logp, lse, expected are tokens"):
        storage.Shard(path, storage.RECORDS, 3)
    with pytest.raises(UserError, match="shard.arrow holds 3 rows, but the manifest says 4"):
        storage.Shard(path, storage.ANNOTATIONS, 4)
    with pytest.raises(UserError, match="nowhere.arrow is missing"):
        storage.Shard(tmp_path / "nowhere.arrow", storage.ANNOTATIONS, 3)


def test_copies_have_the_same_checksum(tmp_path):
    written = annotations(tmp_path / "a.arrow")
    storage.copy_file(tmp_path / "a.arrow", tmp_path / "b.arrow")
    assert storage.checksum(tmp_path / "b.arrow") == written["crc32"] == storage.checksum(tmp_path / "a.arrow")
    (tmp_path / "b.arrow").write_bytes((tmp_path / "b.arrow").read_bytes()[::-1])
    assert storage.checksum(tmp_path / "b.arrow") != written["crc32"]
