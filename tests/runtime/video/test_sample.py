from __future__ import annotations

import numpy as np
import pytest

from tango_plugins import TangoError
from tango_runtime.video import Sampled, open_source, sample
from tests.runtime.video.clips import number_in, picture, rejected, write


def test_too_few_frames_and_bad_arguments_are_rejected(tmp_path):
    path = write(tmp_path / "clip.mp4", times=range(7))
    rejected(path, 32, "has 7 frames, 32 were asked for", "ask for at most 7")
    rejected(path, 0, "0 frames")
    rejected(path, 4, "fps=2", fps=2)
    rejected(np.zeros((4, 8, 8, 3), np.uint8), 4, "fps is 0", fps=0)
    with pytest.raises(TangoError):
        sample(path, 32)  # before the first frame is asked for


def test_what_is_not_a_source_is_rejected():
    rejected(None, 4, "of type NoneType")
    rejected(7, 4, "of type int")
    rejected("", 4, "path of the video is empty")


@pytest.mark.parametrize("n", [1, 2, 5, 60, 299, 1000])
def test_floor_takes_the_indices_of_llava_and_nearest_those_of_qwen(n):
    source = open_source(np.zeros((n, 1, 1, 3), np.uint8))
    for count in {1, 2, 4, 16, 32, n} - set(range(n + 1, 33)):
        floor, nearest = (source.sample(count, rounding=rounding) for rounding in ("floor", "nearest"))
        assert floor.indices.tolist() == np.linspace(0, n - 1, count, dtype=int).tolist()
        assert nearest.indices.tolist() == [round(i * (n - 1) / max(count - 1, 1)) for i in range(count)]
        assert floor.seconds.tolist() == floor.indices.tolist()
        assert len(floor) == count


def test_nearest_rounds_halves_to_even():
    source = open_source(np.zeros((6, 1, 1, 3), np.uint8))
    assert source.sample(3, rounding="nearest").indices.tolist() == [0, 2, 5]  # 2.5
    source = open_source(np.zeros((8, 1, 1, 3), np.uint8))
    assert source.sample(3, rounding="nearest").indices.tolist() == [0, 4, 7]  # 3.5


def test_a_source_of_ones_own():
    class Counter:
        name, duration, frame_size = "a counter", 10.0, (48, 64)

        def sample(self, count, *, rounding="floor"):
            indices = np.arange(count)
            return Sampled(indices, indices / 2, rounding)

        def read(self, chosen):
            return ((s, picture(i)) for i, s in zip(chosen.indices, chosen.seconds, strict=True))

    source = Counter()
    assert open_source(source) is source
    assert [(s, number_in(rgb)) for s, rgb in sample(source, 3)] == [(0.0, 0), (0.5, 1), (1.0, 2)]
    rejected(source, 3, "fps=2", fps=2)
