"""Which clips calibration runs on."""

from __future__ import annotations

import pytest

from examples.make_video import write
from tango_calibration.quantization.clips import read_clips
from tango_plugins import TangoError


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    write(path)
    return path


def test_calibration_never_uses_the_clips_of_evaluation():
    assert all(video.source.split == "validation" for video in read_clips("synthetic", 4, 8))


def test_a_folder_of_videos(clip, tmp_path):
    for i in range(5):
        (tmp_path / f"{i}.mp4").symlink_to(clip)
    (tmp_path / "notes.txt").write_text("not a video")
    assert [video.name for video in read_clips(str(tmp_path), 4, 8)] == ["0.mp4", "1.mp4", "2.mp4", "3.mp4"]


def test_no_folder_no_clips_too_few_clips(clip, tmp_path):
    with pytest.raises(TangoError, match="no folder"):
        read_clips(str(tmp_path / "nowhere"), 16, 8)
    with pytest.raises(TangoError, match="no clips"):
        read_clips(str(tmp_path), 16, 8)
    (tmp_path / "a.mp4").symlink_to(clip)
    with pytest.raises(TangoError, match="gives 1 of the 4 clips"):
        read_clips(str(tmp_path), 16, 8)
