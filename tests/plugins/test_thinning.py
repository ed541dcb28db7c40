"""Inner pruning, against a restatement that goes row by row."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tango_plugins.thinning import Thinning, thin
from tests.plugins import naive_thinning


@given(st.integers(0, 5), st.integers(0, 30), st.integers(0, 5), st.floats(0, 1), st.integers(0, 2**32))
def test_the_reference_agrees_with_the_naive_restatement(before, count, after, ratio, seed):
    rng = np.random.default_rng(seed)
    x, share = rng.normal(size=(before + count + after, 6)), rng.random(before + count + after)
    keep = round(count * ratio)
    rows, stay = thin(x, share, Thinning(before, count, keep))
    expected, places = naive_thinning.thin(x, share, before, count, keep)
    assert stay.tolist() == places
    assert rows == pytest.approx(expected.reshape(rows.shape), abs=1e-12)


def test_ties_go_to_the_lower_row():
    x = np.eye(3)[[0, 1, 0, 1, 2]]
    _, stay = thin(x, np.ones(5), Thinning(0, 5, 2))
    assert stay.tolist() == [0, 1]


def test_a_row_joins_the_first_of_equally_similar_ones_by_share():
    x = np.array([[1.0, 0], [1.0, 0], [1.0, 0]])
    x[2] *= 4
    rows, stay = thin(x, np.array([0.2, 0.5, 0.1]), Thinning(0, 3, 2))
    assert stay.tolist() == [0, 1]
    assert rows.tolist() == [[1, 0], [0.6 + 0.4 * 2.5, 0]]


def test_sums_of_large_rows_do_not_overflow_in_fp16():
    x = np.full((40, 8), 6e4, np.float16)
    rows, _ = thin(x, np.arange(40.0), Thinning(0, 40, 1))
    assert rows.dtype == np.float16
    np.testing.assert_array_equal(rows, x[:1])


def test_nothing_is_changed_where_all_rows_stay():
    x = np.random.default_rng(0).normal(size=(9, 4)).astype(np.float32)
    rows, stay = thin(x, np.arange(9.0), Thinning(2, 5, 5))
    np.testing.assert_array_equal(rows, x)
    assert stay.tolist() == list(range(9))
