"""Arrow shards: atomic writes, reading, and damaged files."""

import errno
import os

import numpy as np
import pyarrow as pa
import pytest

from shiq_jax.errors import UserError
from shiq_jax.replay import storage
from shiq_jax.replay.records import STATISTICS


def test_failed_write_keeps_the_old_content(tmp_path):
    path = tmp_path / "file"
    storage.write_atomically(path, lambda file: file.write(b"old"))

    def fails(file):
        file.write(b"half of the n")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError):
        storage.write_atomically(path, fails)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_full_disk_error_names_the_file(tmp_path):
    def fails(file):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError) as error:
        storage.write_atomically(tmp_path / "file", fails)
    assert error.value.errno == errno.ENOSPC and error.value.filename == str(tmp_path / "file")
    assert not list(tmp_path.iterdir())


def test_file_is_synced_before_it_is_renamed(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (events.append("fsync"), fsync(descriptor)))
    monkeypatch.setattr(os, "replace", lambda *names: (events.append("replace"), replace(*names)))
    assert storage.write_atomically(tmp_path / "file", lambda file: file.write(b"12345")) == 5
    assert events == ["fsync", "replace", "fsync"]


def write_statistics(path, rows=3):
    columns = {
        "logp": [np.full(k, -k, np.float32) for k in range(rows)],
        "lse": [np.zeros(k, np.float32) for k in range(rows)],
    }
    return storage.write_shard(path, storage.STATISTICS_SCHEMA, columns)


def test_shard_is_an_arrow_stream_with_one_batch(tmp_path):
    info = write_statistics(tmp_path / "shard.arrow")
    with pa.OSFile(str(tmp_path / "shard.arrow")) as file:
        batches = list(pa.ipc.open_stream(file))
    assert len(batches) == 1 and batches[0].to_pydict()["logp"] == [[], [-1.0], [-2.0, -2.0]]
    assert info["bytes"] == (tmp_path / "shard.arrow").stat().st_size and info["rows"] == 3


def test_null_and_empty_rows_are_distinct(tmp_path):
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
    storage.write_shard(tmp_path / "shard.arrow", storage.RECORD_SCHEMA, columns)
    shard = storage.Shard(tmp_path / "shard.arrow", storage.RECORD_SCHEMA, 4)
    read = [shard.get("logp", row) for row in range(4)]
    assert read[0] is None and read[3] is None and read[1].size == 0 and read[2].tolist() == [1, 1, 1]
    assert [shard.value("prompt", row) for row in range(4)] == [None, "", "ü", None]
    assert shard.values("chosen") == [True, None, False, None] and shard.values("rank") == [1.0, 2.0, None, 0.0]
    assert (shard.count("logp"), shard.count("user"), shard.count("rewards")) == (2, 0, 4)
    np.testing.assert_array_equal(shard.sums("lse"), [0, 0, 3, 0])


def test_masks_are_read_at_any_bit_offset(tmp_path):
    rng = np.random.default_rng(0)
    masks = [rng.random(size) < 0.5 for size in (1, 7, 8, 9, 0, 31, 64, 3)]
    count = len(masks)
    columns = {field.name: [None] * count for field in storage.RECORD_SCHEMA}
    columns |= {"tokens": [np.zeros(len(mask), np.int32) for mask in masks], "action_mask": masks}
    columns |= {"rewards": [np.zeros(0, np.float32)] * count, "group": ["g"] * count}
    storage.write_shard(tmp_path / "shard.arrow", storage.RECORD_SCHEMA, columns)
    shard = storage.Shard(tmp_path / "shard.arrow", storage.RECORD_SCHEMA, count)
    for row, mask in enumerate(masks):
        np.testing.assert_array_equal(shard.get("action_mask", row), mask)


@pytest.mark.parametrize("keep", [0, 5, 100, 400])
def test_truncated_shards_are_rejected(tmp_path, keep):
    path = tmp_path / "shard.arrow"
    write_statistics(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match="shard.arrow is truncated or corrupt"):
        storage.Shard(path, storage.STATISTICS_SCHEMA, 3)


def test_wrong_schemas_row_counts_and_missing_files_are_rejected(tmp_path):
    path = tmp_path / "shard.arrow"
    write_statistics(path)
    with pytest.raises(UserError, match="shard.arrow has the columns logp, lse, but expected tokens"):
        storage.Shard(path, storage.RECORD_SCHEMA, 3)
    with pytest.raises(UserError, match="shard.arrow has 3 rows, but the manifest expects 4"):
        storage.Shard(path, storage.STATISTICS_SCHEMA, 4)
    with pytest.raises(UserError, match="absent.arrow is missing"):
        storage.Shard(tmp_path / "absent.arrow", storage.STATISTICS_SCHEMA, 3)


def test_copy_has_the_same_checksum(tmp_path):
    info = write_statistics(tmp_path / "a.arrow")
    storage.copy_file(tmp_path / "a.arrow", tmp_path / "b.arrow")
    assert storage.checksum(tmp_path / "b.arrow") == info["crc32"] == storage.checksum(tmp_path / "a.arrow")
    (tmp_path / "b.arrow").write_bytes((tmp_path / "b.arrow").read_bytes()[::-1])
    assert storage.checksum(tmp_path / "b.arrow") != info["crc32"]
