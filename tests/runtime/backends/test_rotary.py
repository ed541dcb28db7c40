"""Rotary positions on three axes, by cache slot."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tango_plugins import TangoError
from tango_runtime.backends.rotary import TEXT, RotaryIds
from tango_runtime.bundle import RotarySpec
from tests.fakes.qwen25vl import positions

SECONDS, UNIT = (RotarySpec((16, 24, 24), step, 2, 128000) for step in ("seconds", "unit"))
GRIDS = [(1, 1, 1), (1, 4, 4), (2, 5, 7), (8, 9, 3), (4, 1, 1), (32, 10, 18), (16, 20, 36)]


def kept_of(grid, share, seed=0):
    total = int(np.prod(grid))
    return np.sort(np.random.default_rng(seed).choice(total, max(1, round(total * share)), replace=False))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("seconds", [1.0, 0.5, 1.5, 0.3, 7.25, 0.0])
def test_all_tokens_have_the_ids_of_the_model(grid, seconds):
    """Text, video, text: what Qwen's own code gives, in transformers 4.49."""
    before, after = 15, 10
    ids = RotaryIds.of(SECONDS, before, grid, seconds, np.arange(np.prod(grid)))
    wanted = positions(before, grid, after, seconds * 2)
    np.testing.assert_array_equal(ids.at(0, wanted.shape[1]), wanted)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5])
def test_kept_tokens_and_what_follows_keep_their_ids(grid, share):
    before, after = 7, 5
    whole, kept = positions(before, grid, after, 3.0), kept_of(grid, share)
    keep = np.concatenate((np.arange(before), before + kept, np.arange(whole.shape[1] - after, whole.shape[1])))
    ids = RotaryIds.of(SECONDS, before, grid, 1.5, kept)
    np.testing.assert_array_equal(ids.at(0, len(keep)), whole[:, keep])
    following = ids.at(len(keep), len(keep) + 3)  # an answer's tokens
    np.testing.assert_array_equal(following, np.tile(whole.max() + 1 + np.arange(3), (3, 1)))
    assert ids.offset == whole.max() + 1 - len(keep)


def test_the_offset_has_either_sign():
    assert RotaryIds.of(SECONDS, 5, (16, 2, 2), 30.0, np.arange(64)).offset > 0
    assert RotaryIds.of(SECONDS, 5, (2, 20, 36), 0.5, np.arange(1440)).offset < 0


def test_a_video_of_which_nothing_is_kept():
    ids = RotaryIds.of(SECONDS, 5, (2, 3, 4), 1.0, np.arange(0))
    assert ids.at(0, 7)[0].tolist() == [0, 1, 2, 3, 4, 9, 10]  # as behind the whole video, 4 columns wide


@given(st.integers(0, 40), st.integers(1, 5), st.integers(1, 6), st.integers(1, 6), st.data())
def test_any_part_is_a_part_of_the_whole(before, steps, rows, columns, data):
    grid = steps, rows, columns
    ids = RotaryIds.of(SECONDS, before, grid, 1.3, kept_of(grid, 0.4))
    end = before + ids.video.shape[1] + 9
    begin = data.draw(st.integers(0, end))
    stop = data.draw(st.integers(begin, end))
    np.testing.assert_array_equal(ids.at(begin, stop), ids.at(0, end)[:, begin:stop])


def test_time_in_units_ignores_the_clock():
    kept = np.arange(24)
    unit = RotaryIds.of(UNIT, 3, (2, 3, 4), 123.4, kept)
    np.testing.assert_array_equal(unit.video, RotaryIds.of(SECONDS, 3, (2, 3, 4), 1.0, kept).video)
    assert unit.video[0].tolist() == [3] * 12 + [5] * 12


def test_what_a_division_left_in_the_seconds_moves_no_id():
    """A clip of 200 frames at 25 a second lasts 7.999… s by its times, and a step of 8 of them 2 s."""
    times = np.arange(200) / 25
    duration = float(times[-1]) * 200 / 199
    below = np.nextafter(2.0, 0)
    for seconds in (2 * duration / 8, below):
        ids = RotaryIds.of(SECONDS, 0, (4, 1, 1), seconds, np.arange(4))
        assert ids.video[0].tolist() == [0, 4, 8, 12]


def test_text_alone_stands_in_its_slots():
    assert TEXT.at(3, 6).tolist() == [[3, 4, 5]] * 3
    assert TEXT.offset == 0


def test_a_video_that_goes_beyond_the_decoder():
    ids = RotaryIds.of(SECONDS, 5, (16, 2, 2), 3600.0, np.arange(64))
    ids.require_room(8192, 128000)
    with pytest.raises(TangoError, match=f"positions reach {8192 + ids.offset}, the decoder was made for 100000"):
        ids.require_room(8192, 100000)
