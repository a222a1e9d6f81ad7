"""Exponents are slopes, and the compiler's own numbers keep their promises at small sizes."""

import pytest

from benchmarks import growth


def test_an_exponent_is_the_slope_in_logarithms():
    assert growth.exponent([1, 2, 4, 8], [3, 6, 12, 24]) == pytest.approx(1)
    assert growth.exponent([10, 100], [5, 500]) == pytest.approx(2)
    assert growth.exponent([1, 2, 4], [7, 7, 7]) == pytest.approx(0, abs=1e-12)


def test_the_statistics_hold_no_more_for_a_larger_vocabulary():
    slope, found = growth.memory_in_vocabulary((65_536, 131_072))
    assert slope < 0.05 and min(found) > 1e6
