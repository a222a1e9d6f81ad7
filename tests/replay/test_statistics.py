import hashlib
import itertools
import os

import numpy as np
import pytest

from shiq_jax.errors import UserError
from shiq_jax.replay import Buffer, Identity

MINE = Identity(weights="ab12", dtype="float32", engine={"name": "xla", "block": 128})
OTHER = Identity(weights="cd34", dtype="bfloat16", engine={"name": "xla", "block": 128})


def made_up(buffer, shard, sign=-1.0):
    return [
        (np.full(len(r.rewards), sign, np.float32), np.arange(len(r.rewards)))
        for r in buffer.read(buffer.shards[shard])
    ]


def test_an_identity_is_its_content_in_any_order():
    assert MINE.digest == Identity(dict(reversed(MINE.items()))).digest != OTHER.digest
    assert Identity(b=1, a=2).digest == hashlib.sha256(b'{"a":2,"b":1}').hexdigest()
    for bad in (float("nan"), object()):
        with pytest.raises(ValueError, match="JSON"):
            _ = Identity(value=bad).digest


def test_annotation_goes_on_where_it_was_interrupted(make_groups, make_buffer):
    buffer = make_buffer(make_groups(np.random.default_rng(0)), parts=3)
    assert buffer.missing_statistics(MINE) == [0, 1, 2]
    buffer.write_statistics(MINE, 1, made_up(buffer, 1))
    with pytest.raises(UserError, match=r"weights=ab12 for 1 of 3 shards; finish"):
        buffer.statistics(MINE)
    opened = Buffer.open(buffer.path)
    for shard in opened.missing_statistics(MINE):
        opened.write_statistics(MINE, shard, made_up(opened, shard))
    statistics = Buffer.open(buffer.path).statistics(dict(MINE))
    assert len(statistics) == len(buffer)
    order = np.random.default_rng(1).permutation(len(buffer))
    for record, (logp, lse) in zip(opened.read(order), statistics.read(order), strict=True):
        np.testing.assert_array_equal(logp, np.full(len(record.rewards), -1))
        np.testing.assert_array_equal(lse, np.arange(len(record.rewards)))
        assert logp.dtype == lse.dtype == np.float32
    opened.verify()


def test_statistics_of_another_model_are_refused_with_both_names(make_groups, make_buffer):
    buffer = make_buffer(make_groups(np.random.default_rng(2)))
    with pytest.raises(UserError, match="holds no statistics, wanted are those made by .*weights=ab12"):
        buffer.statistics(MINE)
    buffer.write_statistics(OTHER, 0, made_up(buffer, 0))
    with pytest.raises(UserError) as caught:
        buffer.statistics(MINE)
    assert "weights=cd34" in str(caught.value) and "weights=ab12" in str(caught.value)


def test_several_identities_live_side_by_side(make_groups, make_buffer):
    buffer = make_buffer(make_groups(np.random.default_rng(3)))
    buffer.write_statistics(MINE, 0, made_up(buffer, 0, -1.0))
    buffer.write_statistics(OTHER, 0, made_up(buffer, 0, -2.0))
    assert buffer.statistics(MINE)[0][0][0] == -1 and buffer.statistics(OTHER)[0][0][0] == -2
    assert buffer.identities() == [(MINE, [0]), (OTHER, [0])]


def test_the_samplers_own_statistics_serve_without_a_copy(make_groups, make_buffer):
    records = make_groups(np.random.default_rng(4))
    buffer = make_buffer(records, parts=2)
    size = buffer.bytes
    buffer.adopt_sampler_statistics(MINE)
    buffer.adopt_sampler_statistics(MINE)
    statistics = Buffer.open(buffer.path).statistics(MINE)
    for index, record in enumerate(records):
        np.testing.assert_array_equal(statistics[index][0], record.logp)
        np.testing.assert_array_equal(statistics[index][1], record.lse)
    assert buffer.bytes == size and not (buffer.path / "statistics").exists()
    buffer.append(records[:2])
    assert buffer.missing_statistics(MINE) == [2], "what is appended later was made by nobody known"
    buffer.write_statistics(MINE, 2, made_up(buffer, 2))
    assert buffer.statistics(MINE)[len(records)][0][0] == -1


def test_adoption_needs_every_record_to_have_them(make_record, make_buffer):
    rng = np.random.default_rng(5)
    records = [make_record(rng), make_record(rng), make_record(rng, statistics=False)]
    buffer = make_buffer(records, parts=2)
    with pytest.raises(UserError, match="record 2 carries no lse of its sampler.*annotate"):
        buffer.adopt_sampler_statistics(MINE)
    assert Buffer.open(buffer.path).identities() == []


@pytest.mark.parametrize("moment", range(2))
def test_dying_while_writing_statistics_loses_only_that_shard(make_groups, make_buffer, monkeypatch, moment):
    records = make_groups(np.random.default_rng(6))
    buffer = make_buffer(records, parts=2)
    buffer.write_statistics(MINE, 0, made_up(buffer, 0))
    replace, calls = os.replace, itertools.count()

    def dying(source, target):
        if next(calls) == moment:
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dying)
        with pytest.raises(KeyboardInterrupt):
            buffer.write_statistics(MINE, 1, made_up(buffer, 1))
    opened = Buffer.open(buffer.path)
    assert opened.missing_statistics(MINE) == [1] and opened.read(range(len(records))) == records
    opened.write_statistics(MINE, 1, made_up(opened, 1))
    assert len(Buffer.open(buffer.path).statistics(MINE)) == len(records)
    directory = buffer.path / "statistics" / MINE.digest
    assert sorted(file.name for file in directory.iterdir()) == ["00000.arrow", "00001.arrow"]


def test_statistics_that_do_not_fit_are_refused(make_record, make_buffer):
    rng = np.random.default_rng(7)
    buffer = make_buffer([make_record(rng, length=5), make_record(rng, length=5)])
    good = made_up(buffer, 0)
    with pytest.raises(UserError, match="for 1 records were given, the shard holds 2"):
        buffer.write_statistics(MINE, 0, good[:1])
    with pytest.raises(UserError, match=r"record 1: lse has shape \(1,\)|record 1: lse has shape \(0,\)"):
        buffer.write_statistics(MINE, 0, [good[0], (good[1][0], good[1][1][:-1][:1])])
    with pytest.raises(UserError, match="record 0: logp is not finite"):
        buffer.write_statistics(MINE, 0, [(good[0][0] * np.nan, good[0][1]), good[1]])
    with pytest.raises(UserError, match="has 1 shards, statistics were given for shard 1"):
        buffer.write_statistics(MINE, 1, good)
    buffer.write_statistics(MINE, 0, good)
    with pytest.raises(UserError, match="already"):
        buffer.write_statistics(MINE, 0, good)


def test_a_truncated_sidecar_is_named(make_groups, make_buffer):
    buffer = make_buffer(make_groups(np.random.default_rng(8)))
    buffer.write_statistics(MINE, 0, made_up(buffer, 0))
    file = buffer.path / "statistics" / MINE.digest / "00000.arrow"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match="00000.arrow has 100 bytes"):
        Buffer.open(buffer.path)
