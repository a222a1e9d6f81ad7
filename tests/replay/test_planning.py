"""Batch shapes: little padding, and room for every batch."""

import numpy as np
import pytest

from shiq_jax.errors import UserError
from shiq_jax.replay import Record, Schedule, pack, pack_groups, plan


def random_records(rng, sizes):
    """One record of each size, each in its own group; half of its tokens are actions."""
    masks = [np.arange(size) >= size - size // 2 for size in sizes]
    tokens = [rng.integers(50, size=size) for size in sizes]
    return [
        Record(tokens=row, action_mask=mask, rewards=np.zeros(mask.sum()), group=f"g{k}")
        for k, (row, mask) in enumerate(zip(tokens, masks, strict=True))
    ]


def fill_of_batches(records, groups, shape, batch_size, rows_multiple=1):
    schedule = Schedule(len(groups), batch_size, 5)
    batches = [[groups[k] for k in schedule.indices(step)] for step in range(schedule.steps())]
    return [pack(batch, records, shape, rows_multiple=rows_multiple).fill for batch in batches]


def single_groups(records):
    return [((k,),) for k in range(len(records))]


def test_rows_of_mixed_lengths_have_little_padding():
    rng = np.random.default_rng(2)
    records = random_records(rng, rng.integers(20, 200, size=256))
    shape = plan(records, single_groups(records), row_length=512)
    assert shape.length == 512
    assert np.mean(fill_of_batches(records, single_groups(records), shape, 64)) > 0.85
    assert shape.actions < 0.65 * shape.length, "logits must not be computed at every token"


def test_planned_rows_hold_two_sequences_where_that_saves_padding():
    rng = np.random.default_rng(3)
    records = random_records(rng, [1000, *rng.integers(700, 780, size=127)])
    shortest = plan(records, single_groups(records))
    assert shortest.length == 1024 and np.mean(fill_of_batches(records, single_groups(records), shortest, 32)) < 0.8
    optimized = plan(records, single_groups(records), batch_size=32)
    assert 1480 <= optimized.length <= 1600
    assert np.mean(fill_of_batches(records, single_groups(records), optimized, 32)) > 0.9


def test_rows_stay_short_if_longer_ones_save_nothing():
    rng = np.random.default_rng(4)
    records = random_records(rng, [128] * 64)
    assert plan(records, single_groups(records), batch_size=16).length == 128
    # With two pack groups per row, half of the eight rows would be padding.
    records = random_records(rng, [200] * 64)
    assert plan(records, single_groups(records), batch_size=8, rows_multiple=8).length == 256


def test_every_batch_fits_the_planned_shape(make_groups, make_buffer):
    buffer = make_buffer(make_groups(np.random.default_rng(5), groups=20))
    for unit in ("trajectory", "group"):
        groups = pack_groups(buffer, unit)
        shape = plan(buffer, groups, multiple=4, batch_size=7)
        assert shape.length % 4 == 0 and shape.steps % 8 == 0
        assert all(0 < fill <= 1 for fill in fill_of_batches(buffer, groups, shape, 7))


def test_oversized_pack_groups_are_rejected(make_buffer):
    records = [
        Record(tokens=[1, *tokens], action_mask=[0, 0, 1, 1, 1], rewards=[0] * 3, group="g")
        for tokens in ([2, 3, 4, 5], [2, 3, 7, 8])
    ]
    buffer = make_buffer(records)
    with pytest.raises(
        UserError, match=r"2 sequences has 7 tokens, but a row holds 6 \(its longest sequence, record 0, has 5\)"
    ):
        plan(buffer, pack_groups(buffer, "trajectory"), row_length=6)
    assert plan(buffer, pack_groups(buffer, "trajectory", row_length=6), row_length=6).length == 6


def test_no_examples_are_rejected():
    with pytest.raises(UserError, match="no example"):
        plan([], [])
