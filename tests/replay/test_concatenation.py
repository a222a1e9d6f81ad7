"""Concatenation of replay buffers: records, statistics, interruption and occupied paths."""

import os

import numpy as np
import pytest

from shiq_jax.errors import UserError
from shiq_jax.replay import Buffer, Identity, concatenate

FIRST = Identity(weights="ab12")
SECOND = Identity(weights="cd34")


def annotate(buffer, identity, value):
    for shard in buffer.missing_statistics(identity):
        rows = buffer.read(buffer.shards[shard])
        buffer.write_statistics(
            identity, shard, [(np.full(len(r.rewards), value), np.zeros(len(r.rewards))) for r in rows]
        )


def test_concatenates_records_and_statistics(make_groups, make_buffer, tmp_path):
    rng = np.random.default_rng(0)
    parts = [make_groups(rng, groups=3) for _ in range(3)]
    buffers = [make_buffer(part, name=f"part{k}", shards=k + 1) for k, part in enumerate(parts)]
    for k, buffer in enumerate(buffers[:2]):
        annotate(buffer, FIRST, -1.0 - k)
    buffers[2].adopt_sampler_statistics(FIRST)
    annotate(buffers[1], SECOND, -9.0)
    joined = concatenate([buffer.path for buffer in buffers], tmp_path / "joined")
    records = sum(parts, [])
    for buffer in (joined, Buffer.open(tmp_path / "joined")):
        assert buffer.read(range(len(buffer))) == records
        assert buffer.missing_statistics(SECOND) == [0, 3, 4, 5]
        statistics = buffer.statistics(FIRST)
        for index, record in enumerate(records):
            part = int(np.searchsorted(np.cumsum([len(part) for part in parts]), index, side="right"))
            expected = record.logp if part == 2 else np.full(len(record.rewards), -1.0 - part)
            np.testing.assert_array_equal(statistics[index][0], expected)
        buffer.verify()
    for buffer, part in zip(buffers, parts, strict=True):
        assert Buffer.open(buffer.path).read(range(len(part))) == part, "the sources must not change"


def test_interrupted_call_can_be_repeated(make_groups, make_buffer, tmp_path, monkeypatch):
    records = make_groups(np.random.default_rng(1))
    buffer = make_buffer(records, shards=2)
    replace = os.replace

    def interrupted_replace(source, target):
        if str(target).endswith("joined/records-00001.arrow"):
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupted_replace)
        with pytest.raises(KeyboardInterrupt):
            concatenate([buffer.path], tmp_path / "joined")
    assert len(Buffer.open(tmp_path / "joined")) == 0
    joined = concatenate([buffer.path], tmp_path / "joined")
    assert joined.read(range(len(joined))) == records
    assert len(list(joined.path.iterdir())) == 3


def test_rejects_occupied_paths(make_groups, make_buffer, tmp_path):
    buffer = make_buffer(make_groups(np.random.default_rng(2)))
    with pytest.raises(UserError, match=f"already a replay buffer with {len(buffer)} records"):
        concatenate([buffer.path], buffer.path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").touch()
    with pytest.raises(UserError, match="contains other files, such as notes"):
        concatenate([buffer.path], tmp_path / "full")
    with pytest.raises(UserError, match="is not a replay buffer"):
        concatenate([buffer.path, tmp_path / "full"], tmp_path / "new")
    assert not (tmp_path / "new").exists()
