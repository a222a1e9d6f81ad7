"""Replay buffer on disk: round trips, atomic appends, concurrent writers and damaged files."""

import itertools
import os
import tempfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shiq_jax.errors import UserError
from shiq_jax.replay import Buffer, Record, storage


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), appends=st.lists(st.integers(0, 6), max_size=4), shard_rows=st.integers(1, 4))
def test_append_and_read_round_trip(make_record, seed, appends, shard_rows):
    rng = np.random.default_rng(seed)
    records = []
    with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "SHARD_ROWS", shard_rows)
        buffer = Buffer.create(directory + "/buffer")
        for count in appends:
            batch = [
                make_record(rng, group=f"g{rng.integers(3)}", statistics=bool(rng.integers(2))) for _ in range(count)
            ]
            assert buffer.append(iter(batch)) == count
            records += batch
        for opened in (buffer, Buffer.open(directory + "/buffer")):
            assert len(opened) == len(records)
            assert opened.read(range(len(records))) == records
            assert opened.group_ids() == [record.group for record in records]
            assert opened.user_ids() == [record.user for record in records]
            assert opened.lengths().tolist() == [len(record.tokens) for record in records]
            assert opened.actions().tolist() == [int(record.action_mask.sum()) for record in records]
            expected = [record.rewards.astype(np.float64).sum() for record in records]
            np.testing.assert_allclose(opened.returns(), expected, rtol=1e-12, atol=1e-12)
            assert list(itertools.chain(*opened.shards)) == list(range(len(records)))
            assert max(map(len, opened.shards), default=0) <= shard_rows
            assert opened.coverage()["lse"] == sum(record.lse is not None for record in records)
            opened.verify()


def test_reads_are_read_only_views(make_record, make_buffer):
    buffer = make_buffer([make_record(np.random.default_rng(0))])
    tokens = buffer[0].tokens
    assert tokens.base is not None and not tokens.flags.writeable
    with pytest.raises(ValueError):
        tokens[0] = 1


def test_returns_do_not_depend_on_the_position_in_a_shard(make_buffer):
    record = Record(tokens=[0, 1, 2], action_mask=[0, 1, 1], rewards=[0.1, 0.2], group="g")
    large = Record(tokens=[0, 1], action_mask=[0, 1], rewards=[1e7], group="g")
    returns = make_buffer([record, large, record, large, record]).returns()
    assert returns[0] == returns[2] == returns[4]


def test_read_preserves_order_and_repetition(make_record, make_buffer):
    rng = np.random.default_rng(1)
    records = [make_record(rng) for _ in range(7)]
    buffer = make_buffer(records, shards=3)
    indices = np.array([6, 0, 3, 3, 2])
    assert buffer.read(indices) == [records[index] for index in indices]
    for index in (7, -1):
        with pytest.raises(IndexError, match=f"record index {index} is out of range: .* has 7 records"):
            buffer.read([index])


class Killed(BaseException):
    """Simulates the death of the process; the library does not catch it."""


@pytest.mark.parametrize("rename", range(3))
@pytest.mark.parametrize("after", [False, True])
def test_killed_append_leaves_the_buffer_unchanged(make_record, make_buffer, monkeypatch, rename, after):
    rng = np.random.default_rng(2)
    old, new = [make_record(rng) for _ in range(3)], [make_record(rng) for _ in range(4)]
    buffer = make_buffer(old)
    monkeypatch.setattr(storage, "SHARD_ROWS", 2)
    replace, calls = os.replace, itertools.count()

    def killed_replace(source, target):
        # Two shards and the manifest are renamed, in this order.
        if next(calls) == rename:
            if after:
                replace(source, target)
            raise Killed
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed_replace)
        # A killed process does not clean up.
        patch.setattr("shiq_jax.replay.buffer.remove_leftovers", lambda *_: None)
        with pytest.raises(Killed):
            buffer.append(new)
    committed = old + new if rename == 2 and after else old
    opened = Buffer.open(buffer.path)
    assert opened.read(range(len(opened))) == committed
    opened.append(new)
    reopened = Buffer.open(buffer.path)
    assert reopened.read(range(len(reopened))) == committed + new
    listed = {file.name for file in reopened.record_files()} | {"manifest.json"}
    assert {file.name for file in buffer.path.iterdir()} == listed


def test_invalid_record_leaves_the_buffer_unchanged(make_record, make_buffer, monkeypatch):
    rng = np.random.default_rng(3)
    buffer = make_buffer([make_record(rng)])
    before = sorted(file.name for file in buffer.path.iterdir())
    monkeypatch.setattr(storage, "SHARD_ROWS", 1)
    bad = Record(tokens=[1, 90], action_mask=[0, 1], rewards=[1.0], group="bad")
    with pytest.raises(UserError, match=r"appended record 2 \(group 'bad'\): token id 90"):
        buffer.append([make_record(rng), make_record(rng), bad], vocab_size=50)
    assert sorted(file.name for file in buffer.path.iterdir()) == before
    assert len(Buffer.open(buffer.path)) == len(buffer) == 1


def test_concurrent_writers_are_rejected(make_record, make_buffer):
    rng = np.random.default_rng(4)
    first = make_buffer([make_record(rng)])
    second = Buffer.open(first.path)
    second.append([make_record(rng)])
    with pytest.raises(UserError, match="modified by another process"):
        first.append([make_record(rng)])
    assert len(first) == 1 and len(Buffer.open(first.path)) == 2


def test_open_buffer_is_a_snapshot(make_record, make_buffer):
    rng = np.random.default_rng(5)
    records = [make_record(rng) for _ in range(4)]
    writer = make_buffer(records[:2])
    reader = Buffer.open(writer.path)
    writer.append(records[2:])
    assert reader.read(range(len(reader))) == records[:2]


def test_create_rejects_occupied_paths(make_record, make_buffer, tmp_path):
    buffer = make_buffer([make_record(np.random.default_rng(6))])
    with pytest.raises(UserError, match="is already a replay buffer"):
        Buffer.create(buffer.path)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="contains other files, such as notes.txt"):
        Buffer.create(tmp_path / "notes")
    with pytest.raises(UserError, match="is a file"):
        Buffer.create(tmp_path / "notes" / "notes.txt")
    # Shards without a manifest are user data, not leftovers.
    (buffer.path / "manifest.json").unlink()
    with pytest.raises(UserError, match="records-00000.arrow"):
        Buffer.create(buffer.path)
    assert (buffer.path / "records-00000.arrow").exists() and (tmp_path / "notes" / "notes.txt").read_text() == "mine"


def test_open_reports_truncated_and_missing_shards(make_record, make_buffer):
    rng = np.random.default_rng(7)
    buffer = make_buffer([make_record(rng) for _ in range(4)], shards=2)
    shard = buffer.record_files()[1]
    content = shard.read_bytes()
    shard.write_bytes(content[:-20])
    with pytest.raises(
        UserError, match=f"records-00001.arrow has {len(content) - 20} bytes; the manifest expects {len(content)}"
    ):
        Buffer.open(buffer.path)
    shard.unlink()
    with pytest.raises(UserError, match="records-00001.arrow is missing"):
        Buffer.open(buffer.path)


def test_report_verifies_checksums(make_record, make_buffer):
    buffer = make_buffer([make_record(np.random.default_rng(8), length=50)])
    shard = buffer.record_files()[0]
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match="records-00000.arrow is corrupt"):
        Buffer.open(buffer.path).report()
