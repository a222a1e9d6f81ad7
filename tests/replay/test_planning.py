import numpy as np
import pytest

from shiq_jax.errors import UserError
from shiq_jax.replay import Record, Schedule, pack, pack_groups, plan


def records_of(rng, sizes):
    """One record per size, each a group of its own, half of it actions."""
    masks = [np.arange(size) >= size - size // 2 for size in sizes]
    tokens = [rng.integers(50, size=size) for size in sizes]
    return [
        Record(tokens=row, action_mask=mask, rewards=np.zeros(mask.sum()), group=f"g{k}")
        for k, (row, mask) in enumerate(zip(tokens, masks, strict=True))
    ]


def fills(records, chosen, shape, batch_size, rows_multiple=1):
    schedule = Schedule(len(chosen), batch_size, 5)
    batches = [[chosen[k] for k in schedule.indices(step)] for step in range(schedule.steps())]
    return [pack(batch, records, shape, rows_multiple=rows_multiple).fill for batch in batches]


def singles(records):
    return [((k,),) for k in range(len(records))]


def test_rows_of_mixed_lengths_are_well_filled():
    rng = np.random.default_rng(2)
    records = records_of(rng, rng.integers(20, 200, size=256))
    shape = plan(records, singles(records), row_length=512)
    assert shape.length == 512
    assert np.mean(fills(records, singles(records), shape, 64)) > 0.85
    assert shape.actions < 0.65 * shape.length, "the vocabulary is not projected at every place"


def test_a_length_that_holds_two_is_found():
    rng = np.random.default_rng(3)
    records = records_of(rng, [1000, *rng.integers(700, 780, size=127)])
    alone = plan(records, singles(records))
    assert alone.length == 1024 and np.mean(fills(records, singles(records), alone, 32)) < 0.8
    tried = plan(records, singles(records), batch_size=32)
    assert 1480 <= tried.length <= 1600
    assert np.mean(fills(records, singles(records), tried, 32)) > 0.9


def test_rows_stay_short_when_nothing_is_won():
    rng = np.random.default_rng(4)
    even = records_of(rng, [128] * 64)
    assert plan(even, singles(even), batch_size=16).length == 128
    # Two pack_groups in a row would leave half of eight devices' rows empty.
    wide = records_of(rng, [200] * 64)
    assert plan(wide, singles(wide), batch_size=8, rows_multiple=8).length == 256


def test_whatever_is_drawn_fits_the_plan(make_groups, make_buffer):
    buffer = make_buffer(make_groups(np.random.default_rng(5), groups=20))
    for unit in ("trajectory", "group"):
        chosen = pack_groups(buffer, unit)
        shape = plan(buffer, chosen, multiple=4, batch_size=7)
        assert shape.length % 4 == 0 and shape.steps % 8 == 0
        assert all(0 < fill <= 1 for fill in fills(buffer, chosen, shape, 7))


def test_too_long_a_bundle_is_refused_by_record(make_buffer):
    records = [
        Record(tokens=[1, *own], action_mask=[0, 0, 1, 1, 1], rewards=[0] * 3, group="g")
        for own in ([2, 3, 4, 5], [2, 3, 7, 8])
    ]
    buffer = make_buffer(records)
    with pytest.raises(
        UserError, match=r"2 sequences takes 7 tokens and a row holds 6 \(its longest, record 0, has 5\)"
    ):
        plan(buffer, pack_groups(buffer, "trajectory"), row_length=6)
    assert plan(buffer, pack_groups(buffer, "trajectory", row_length=6), row_length=6).length == 6


def test_nothing_to_plan_is_refused():
    with pytest.raises(UserError, match="no example"):
        plan([], [])
