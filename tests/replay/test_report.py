"""Summaries of a buffer, and the estimate of its size."""

import json

import numpy as np
import pytest

from shiq_jax.replay import Identity, Record, estimate_bytes, storage


def test_summary_matches_the_records(make_buffer):
    records = [
        Record(
            tokens=[0] * (3 + k),
            action_mask=[0, 1, 1] + [0] * k,
            rewards=[0.5, k],
            group=f"g{k // 2}",
            user="u" if k else None,
        )
        for k in range(5)
    ]
    buffer = make_buffer(records, shards=2)
    summary = buffer.describe()
    counts = {key: summary[key] for key in ("sequences", "groups", "users", "tokens", "actions", "shards")}
    assert counts == dict(sequences=5, groups=3, users=1, tokens=25, actions=10, shards=2)
    assert summary["return"] == dict(mean=2.5, min=0.5, p25=1.5, median=2.5, p75=3.5, max=4.5)
    assert summary["group_size"]["max"] == 2 and summary["length"]["mean"] == 5
    assert summary["bytes"] == sum(file.stat().st_size for file in buffer.record_files())
    assert summary["coverage"] == dict(
        behaviour_logp=0, logp=0, lse=0, prompt=0, user=4, chosen=0, label=0, rank=0, score=0
    )
    assert json.loads(json.dumps(summary)) == summary


def test_report_shows_statistics_and_their_coverage(make_record, make_buffer):
    rng = np.random.default_rng(0)
    buffer = make_buffer([make_record(rng, length=40) for _ in range(4)], shards=2)
    assert "none; annotate the buffer" in buffer.report()
    record = buffer[0]
    identity = Identity(weights="ab12", dtype="float32")
    buffer.write_statistics(identity, 0, [(r.logp, r.lse) for r in buffer.read(buffer.shards[0])])
    text = buffer.report()
    assert f"{identity.digest[:12]}  2 of 4 sequences: dtype=float32, weights=ab12" in text
    assert f"return {record.rewards.astype(float).sum():.4g}" in text
    end = zip(record.tokens[-12:], record.action_mask[-12:], strict=True)
    assert "... " + " ".join(f"{token}{'*' if action else ''}" for token, action in end) in text


def test_report_of_an_empty_buffer(make_buffer):
    buffer = make_buffer([])
    assert "0 in 0 groups" in buffer.report() and buffer.describe()["sample"] is None


@pytest.mark.parametrize("sequences, length, actions", [(40, 12, 4), (300, 120, 30), (9, 3000, 2500)])
@pytest.mark.parametrize("with_statistics, models", [(True, 0), (True, 2), (False, 1)])
def test_estimated_bytes_are_within_ten_percent(
    make_buffer, monkeypatch, sequences, length, actions, with_statistics, models
):
    monkeypatch.setattr(storage, "SHARD_ROWS", 256)
    rng = np.random.default_rng(1)
    columns = {name: -rng.random(actions) for name in ("behaviour_logp", "logp", "lse")} if with_statistics else {}
    mask = np.arange(length) >= length - actions
    prompt = json.dumps({"prompt": "x" * 70})
    records = [
        Record(
            tokens=rng.integers(9, size=length),
            action_mask=mask,
            rewards=rng.random(actions),
            group=f"{k:04d}",
            prompt=prompt,
            **columns,
        )
        for k in range(sequences)
    ]
    buffer = make_buffer(records)
    for model in range(models):
        for shard, numbers in enumerate(buffer.shards):
            buffer.write_statistics(
                Identity(weights=model), shard, [(-np.ones(actions), np.ones(actions)) for _ in numbers]
            )
    estimate = estimate_bytes(
        sequences,
        sequences * length,
        sequences * actions,
        models,
        sampler_statistics=3 if with_statistics else 0,
        text_bytes=sequences * (4 + len(prompt)),
    )
    size = sum(file.stat().st_size for file in buffer.path.rglob("*.arrow"))
    assert size == buffer.bytes
    assert abs(estimate - size) <= 0.1 * size
