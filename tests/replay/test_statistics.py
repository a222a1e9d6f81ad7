"""Stored token statistics: identities, adoption, interruption and damaged files."""

import hashlib
import itertools
import os

import numpy as np
import pytest

from shiq_jax.errors import UserError
from shiq_jax.replay import Buffer, Identity

FIRST = Identity(weights="ab12", dtype="float32", engine={"name": "xla", "block": 128})
SECOND = Identity(weights="cd34", dtype="bfloat16", engine={"name": "xla", "block": 128})


def fake_statistics(buffer, shard, sign=-1.0):
    return [
        (np.full(len(r.rewards), sign, np.float32), np.arange(len(r.rewards)))
        for r in buffer.read(buffer.shards[shard])
    ]


def test_identity_does_not_depend_on_key_order():
    assert FIRST.digest == Identity(dict(reversed(FIRST.items()))).digest != SECOND.digest
    assert Identity(b=1, a=2).digest == hashlib.sha256(b'{"a":2,"b":1}').hexdigest()
    for value in (float("nan"), object()):
        with pytest.raises(ValueError, match="JSON"):
            _ = Identity(value=value).digest


def test_interrupted_annotation_resumes(make_groups, make_buffer):
    buffer = make_buffer(make_groups(np.random.default_rng(0)), shards=3)
    assert buffer.missing_statistics(FIRST) == [0, 1, 2]
    buffer.write_statistics(FIRST, 1, fake_statistics(buffer, 1))
    with pytest.raises(UserError, match=r"weights=ab12 for only 1 of 3 shards; finish"):
        buffer.statistics(FIRST)
    opened = Buffer.open(buffer.path)
    for shard in opened.missing_statistics(FIRST):
        opened.write_statistics(FIRST, shard, fake_statistics(opened, shard))
    statistics = Buffer.open(buffer.path).statistics(dict(FIRST))
    assert len(statistics) == len(buffer)
    order = np.random.default_rng(1).permutation(len(buffer))
    for record, (logp, lse) in zip(opened.read(order), statistics.read(order), strict=True):
        np.testing.assert_array_equal(logp, np.full(len(record.rewards), -1))
        np.testing.assert_array_equal(lse, np.arange(len(record.rewards)))
        assert logp.dtype == lse.dtype == np.float32
    opened.verify()


def test_missing_identity_is_reported_with_stored_ones(make_groups, make_buffer):
    buffer = make_buffer(make_groups(np.random.default_rng(2)))
    with pytest.raises(UserError, match="has no statistics, but statistics computed by .*weights=ab12"):
        buffer.statistics(FIRST)
    buffer.write_statistics(SECOND, 0, fake_statistics(buffer, 0))
    with pytest.raises(UserError) as error:
        buffer.statistics(FIRST)
    assert "weights=cd34" in str(error.value) and "weights=ab12" in str(error.value)


def test_buffer_stores_several_identities(make_groups, make_buffer):
    buffer = make_buffer(make_groups(np.random.default_rng(3)))
    buffer.write_statistics(FIRST, 0, fake_statistics(buffer, 0, -1.0))
    buffer.write_statistics(SECOND, 0, fake_statistics(buffer, 0, -2.0))
    assert buffer.statistics(FIRST)[0][0][0] == -1 and buffer.statistics(SECOND)[0][0][0] == -2
    assert buffer.identities() == [(FIRST, [0]), (SECOND, [0])]


def test_sampler_statistics_are_adopted_without_a_copy(make_groups, make_buffer):
    records = make_groups(np.random.default_rng(4))
    buffer = make_buffer(records, shards=2)
    size = buffer.bytes
    buffer.adopt_sampler_statistics(FIRST)
    buffer.adopt_sampler_statistics(FIRST)
    statistics = Buffer.open(buffer.path).statistics(FIRST)
    for index, record in enumerate(records):
        np.testing.assert_array_equal(statistics[index][0], record.logp)
        np.testing.assert_array_equal(statistics[index][1], record.lse)
    assert buffer.bytes == size and not (buffer.path / "statistics").exists()
    buffer.append(records[:2])
    assert buffer.missing_statistics(FIRST) == [2], "later shards are not adopted"
    buffer.write_statistics(FIRST, 2, fake_statistics(buffer, 2))
    assert buffer.statistics(FIRST)[len(records)][0][0] == -1


def test_adoption_requires_lse_in_every_record(make_record, make_buffer):
    rng = np.random.default_rng(5)
    records = [make_record(rng), make_record(rng), make_record(rng, statistics=False)]
    buffer = make_buffer(records, shards=2)
    with pytest.raises(UserError, match="record 2 has no lse from its sampler.*annotate"):
        buffer.adopt_sampler_statistics(FIRST)
    assert Buffer.open(buffer.path).identities() == []


@pytest.mark.parametrize("rename", range(2))
def test_interrupted_write_loses_only_its_shard(make_groups, make_buffer, monkeypatch, rename):
    records = make_groups(np.random.default_rng(6))
    buffer = make_buffer(records, shards=2)
    buffer.write_statistics(FIRST, 0, fake_statistics(buffer, 0))
    replace, calls = os.replace, itertools.count()

    def interrupted_replace(source, target):
        if next(calls) == rename:
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupted_replace)
        with pytest.raises(KeyboardInterrupt):
            buffer.write_statistics(FIRST, 1, fake_statistics(buffer, 1))
    opened = Buffer.open(buffer.path)
    assert opened.missing_statistics(FIRST) == [1] and opened.read(range(len(records))) == records
    opened.write_statistics(FIRST, 1, fake_statistics(opened, 1))
    assert len(Buffer.open(buffer.path).statistics(FIRST)) == len(records)
    directory = buffer.path / "statistics" / FIRST.digest
    assert sorted(file.name for file in directory.iterdir()) == ["00000.arrow", "00001.arrow"]


def test_invalid_statistics_are_rejected(make_record, make_buffer):
    rng = np.random.default_rng(7)
    buffer = make_buffer([make_record(rng, length=5), make_record(rng, length=5)])
    valid = fake_statistics(buffer, 0)
    with pytest.raises(UserError, match="of 1 records for a shard of 2"):
        buffer.write_statistics(FIRST, 0, valid[:1])
    with pytest.raises(UserError, match=r"record 1: lse has shape \(1,\)|record 1: lse has shape \(0,\)"):
        buffer.write_statistics(FIRST, 0, [valid[0], (valid[1][0], valid[1][1][:-1][:1])])
    with pytest.raises(UserError, match="record 0: logp is not finite"):
        buffer.write_statistics(FIRST, 0, [(valid[0][0] * np.nan, valid[0][1]), valid[1]])
    with pytest.raises(UserError, match="has 1 shards, but statistics were passed for shard 1"):
        buffer.write_statistics(FIRST, 1, valid)
    buffer.write_statistics(FIRST, 0, valid)
    with pytest.raises(UserError, match="already has statistics"):
        buffer.write_statistics(FIRST, 0, valid)


def test_truncated_statistics_are_reported(make_groups, make_buffer):
    buffer = make_buffer(make_groups(np.random.default_rng(8)))
    buffer.write_statistics(FIRST, 0, fake_statistics(buffer, 0))
    file = buffer.path / "statistics" / FIRST.digest / "00000.arrow"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match="00000.arrow has 100 bytes"):
        Buffer.open(buffer.path)
