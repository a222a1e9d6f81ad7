"""Random records and the buffers that hold them."""

import numpy as np
import pytest

from shiq_jax.replay import Buffer, Record, trees


def judgements(rng):
    """What the data may say of an answer, each of it or none."""
    drawn = {"chosen": bool(rng.integers(2)), "label": bool(rng.integers(2)), "rank": 3.0, "score": float(rng.normal())}
    return {name: value if rng.random() < 0.6 else None for name, value in drawn.items()}


def random_record(rng, *, group="g", prompt=(), length=None, statistics=True, judged=False, vocab=7):
    """A valid record that begins with the tokens of `prompt`; environment tokens stand between its actions."""
    own = int(rng.integers(1, 9)) if length is None else length
    start = list(prompt) or [int(rng.integers(vocab))]
    mask = rng.random(own) < 0.7
    mask[rng.integers(own)] = True
    actions = int(mask.sum())
    columns = {}
    if statistics:
        names = ("behaviour_logp", "logp", "lse")
        columns = {name: (-rng.exponential(size=actions)).astype(np.float32) for name in names}
    return Record(
        tokens=np.concatenate([start, rng.integers(vocab, size=own)]).astype(np.int32),
        action_mask=np.concatenate([np.zeros(len(start), bool), mask]),
        rewards=rng.normal(size=actions).astype(np.float32),
        group=group,
        prompt=None if rng.random() < 0.3 else f'{{"prompt": "größer {group}"}}',
        user=None if rng.random() < 0.5 else f"user {rng.integers(3)}",
        **(judgements(rng) if judged else {}),
        **columns,
    )


def random_groups(rng, groups=5, size=4, **options):
    """Records of several groups in mixed order; those of a group share a prompt."""
    records = []
    for number in range(groups):
        prompt = rng.integers(7, size=rng.integers(1, 12)).tolist()
        records += [
            random_record(rng, group=f"g{number}", prompt=prompt, **options) for _ in range(rng.integers(1, size + 1))
        ]
    return [records[place] for place in rng.permutation(len(records))]


@pytest.fixture(scope="session")
def make_record():
    return random_record


@pytest.fixture(scope="session")
def make_groups():
    return random_groups


@pytest.fixture
def make_buffer(tmp_path):
    def make(records, name="buffer", parts=1):
        buffer = Buffer.create(tmp_path / name)
        for part in np.array_split(np.arange(len(records)), parts):
            buffer.append([records[place] for place in part])
        return buffer

    return make


@pytest.fixture
def builds(monkeypatch):
    """Collects the sequences of each trie that is built."""
    seen, build = [], trees.build
    monkeypatch.setattr(trees, "build", lambda sequences: seen.append(sequences) or build(sequences))
    return seen
