"""Random records, and buffers of them."""

import numpy as np
import pytest

from shiq_jax.replay import Buffer, Record, trees


def random_feedback(rng):
    """Random feedback fields; each may be missing."""
    values = {
        "chosen": bool(rng.integers(2)),
        "label": bool(rng.integers(2)),
        "rank": 3.0,
        "score": float(rng.normal()),
    }
    return {name: value if rng.random() < 0.6 else None for name, value in values.items()}


def random_record(rng, *, group="g", prompt=(), length=None, statistics=True, feedback=False, vocab=7):
    """A valid record with `prompt`, or a random token, followed by `length` tokens, of which about 70% are actions."""
    length = int(rng.integers(1, 9)) if length is None else length
    start = list(prompt) or [int(rng.integers(vocab))]
    mask = rng.random(length) < 0.7
    mask[rng.integers(length)] = True
    actions = int(mask.sum())
    columns = {}
    if statistics:
        names = ("behaviour_logp", "logp", "lse")
        columns = {name: (-rng.exponential(size=actions)).astype(np.float32) for name in names}
    return Record(
        tokens=np.concatenate([start, rng.integers(vocab, size=length)]).astype(np.int32),
        action_mask=np.concatenate([np.zeros(len(start), bool), mask]),
        rewards=rng.normal(size=actions).astype(np.float32),
        group=group,
        prompt=None if rng.random() < 0.3 else f'{{"prompt": "größer {group}"}}',
        user=None if rng.random() < 0.5 else f"user {rng.integers(3)}",
        **(random_feedback(rng) if feedback else {}),
        **columns,
    )


def random_groups(rng, groups=5, size=4, **options):
    """Records of several groups in random order; the records of a group share a prompt."""
    records = []
    for number in range(groups):
        prompt = rng.integers(7, size=rng.integers(1, 12)).tolist()
        records += [
            random_record(rng, group=f"g{number}", prompt=prompt, **options) for _ in range(rng.integers(1, size + 1))
        ]
    return [records[index] for index in rng.permutation(len(records))]


@pytest.fixture(scope="session")
def make_record():
    return random_record


@pytest.fixture(scope="session")
def make_groups():
    return random_groups


@pytest.fixture
def make_buffer(tmp_path):
    def make(records, name="buffer", shards=1):
        buffer = Buffer.create(tmp_path / name)
        for indices in np.array_split(np.arange(len(records)), shards):
            buffer.append([records[index] for index in indices])
        return buffer

    return make


@pytest.fixture
def build_calls(monkeypatch):
    """Arguments of every call of `build_trie` in `trees`."""
    calls, build_trie = [], trees.build_trie
    monkeypatch.setattr(trees, "build_trie", lambda sequences: calls.append(sequences) or build_trie(sequences))
    return calls
