"""Row ends, against a restatement that goes token by token."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tango_plugins.row_ends import row_order, with_row_ends


def one_by_one(indices, columns):
    order = []
    for place, index in enumerate(indices):
        order.append(place)
        if place + 1 == len(indices) or indices[place + 1] // columns != index // columns:
            order.append(-1)
    return order


@given(st.sets(st.integers(0, 400)).map(sorted), st.integers(1, 14))
def test_a_row_end_follows_each_row_that_keeps_a_token(indices, columns):
    order = row_order(np.array(indices, np.int32), columns)
    assert order.dtype == np.int32
    assert order.tolist() == one_by_one(indices, columns)
    assert (order == -1).sum() == len({index // columns for index in indices})


def test_a_whole_video_has_a_row_end_after_every_row():
    """LLaVA-Video: 64 frames of 13 rows of 13 tokens."""
    assert len(row_order(np.arange(64 * 169), 13)) == 64 * 13 * 14 == 11_648


def test_the_last_row_of_a_frame_is_not_the_first_of_the_next():
    assert row_order(np.array([168, 169]), 13).tolist() == [0, -1, 1, -1]


def test_tokens_and_row_ends():
    tokens, end = np.arange(6, dtype=np.float16).reshape(3, 2), np.array([9, 9], np.float16)
    found = with_row_ends(tokens, np.array([0, 1, 5], np.int32), 4, end)
    assert found.dtype == np.float16
    assert found.tolist() == [[0, 1], [2, 3], [9, 9], [4, 5], [9, 9]]
