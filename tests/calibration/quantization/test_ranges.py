"""Statistics of activations."""

from __future__ import annotations

import numpy as np

from tango_calibration.quantization.ranges import ChannelStats


def test_statistics_of_several_passes():
    a, b = np.array([[1.0, -2], [0, 1]], np.float16), np.array([[-3.0, 0]], np.float16)
    both = ChannelStats.of([a]).merge(ChannelStats.of([b]))
    assert both.amax[0].tolist() == [3, 2]
    np.testing.assert_allclose(both.mean_squares()[0], [10 / 3, 5 / 3])


def test_statistics_of_parts_are_those_of_the_whole():
    rng = np.random.default_rng(0)
    parts = [rng.normal(size=(5, 10, 4)).astype(np.float16) * scale for scale in (1, 30, 0.01)]
    first, second, third = (ChannelStats.of([part]) for part in parts)
    merged, whole = first.merge(second).merge(third), ChannelStats.of([np.concatenate(parts)])
    assert merged.amax[0].tolist() == whole.amax[0].tolist()
    assert merged.rows == whole.rows == [150]
    np.testing.assert_allclose(merged.square_sums[0], whole.square_sums[0])


def test_ranges_are_those_of_the_divided_activations():
    rng = np.random.default_rng(0)
    plain, smoothed = (rng.normal(size=(50, 6)).astype(np.float16) for _ in range(2))
    divisors = np.exp2(rng.integers(-8, 9, 6)).astype(np.float32)
    found = ChannelStats.of([plain, smoothed]).ranges([1.0, divisors])
    assert found == [np.abs(plain).max(), np.abs(smoothed / divisors).max()]


def test_the_range_of_zeros_is_zero():
    assert ChannelStats.of([np.zeros((5, 2), np.float16)]).ranges([1.0]) == [0]
