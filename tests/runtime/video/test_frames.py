from __future__ import annotations

import struct
from collections import deque
from datetime import timedelta
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps

from tango_runtime.video import open_source, sample
from tests.runtime.video.clips import number_in, picture, rejected


def test_arrays(tmp_path):
    frames = np.stack([picture(i) for i in range(10)])
    sampled = list(sample(frames, 4, fps=2))
    assert [(s, number_in(rgb)) for s, rgb in sampled] == [(0.0, 0), (1.5, 3), (3.0, 6), (4.5, 9)]
    assert [s for s, _ in sample(frames, 2)] == [0.0, 9.0]
    rejected(frames.astype(np.float32), 4, "float32", "uint8")
    rejected(frames[0], 1, "[48, 64, 3]")
    rejected(frames[..., :1], 1, "[10, 48, 64, 1]")
    rejected(frames[:0], 1, "no frames")


def test_iterables():
    timed = [(10 + 0.5 * i, picture(i)) for i in range(10)]
    for source in (timed, iter(timed)):
        assert [(s, number_in(rgb)) for s, rgb in sample(source, 4)] == [(0.0, 0), (1.5, 3), (3.0, 6), (4.5, 9)]
    rejected(timed, 4, "fps", fps=1)
    rejected([timed[0], timed[0]], 1, "do not ascend", "frame 1")
    rejected([(float("nan"), picture(0))], 1, "do not ascend")
    rejected([picture(0)], 1, "item 0")
    rejected([(0.0, picture(0).astype(np.float32))], 1, "frame 0 is float32")
    rejected([], 1, "no frames")


def test_a_buffer_that_is_filled_again_and_again():
    def camera():
        buffer = np.empty((48, 64, 3), np.uint8)
        for i in range(12):
            buffer[...] = picture(i)
            yield i / 2, buffer

    assert [number_in(rgb) for _, rgb in sample(camera(), 4)] == [0, 3, 7, 11]


def test_frames_may_leave_a_cameras_buffer_while_they_are_read():
    buffer = deque(((float(i), picture(i)) for i in range(8)), maxlen=8)
    source = open_source(list(buffer))
    chosen = source.sample(4)
    buffer.extend((8.0 + i, picture(8 + i)) for i in range(8))
    assert [(s, number_in(rgb)) for s, rgb in source.read(chosen)] == [(0.0, 0), (2.0, 2), (4.0, 4), (7.0, 7)]


def test_a_sequence_of_one_buffer_is_rejected():
    buffer = picture(0)
    rejected(
        [(0.0, buffer), (1.0, picture(1)), (2.0, buffer[:, :32])], 1, "frames 0 and 2 are the same memory", "copies"
    )


def test_a_sequence_is_not_copied():
    timed = [(float(i), picture(i)) for i in range(4)]
    assert all(given is kept for (_, given), (_, kept) in zip(sample(timed, 4), timed, strict=True))


@pytest.mark.parametrize(
    "second",
    [Fraction(1, 2), Decimal("0.5"), timedelta(milliseconds=500), np.float32(0.5), np.timedelta64(500, "ms")],
    ids=lambda second: type(second).__name__,
)
def test_seconds_of_several_types(second):
    timed = [(second * (10 + i), picture(i)) for i in range(4)]
    sampled = list(sample(timed, 4))
    assert [(s, number_in(rgb)) for s, rgb in sampled] == [(0.0, 0), (0.5, 1), (1.0, 2), (1.5, 3)]
    assert {type(s) for s, _ in sampled} == {float}


@pytest.mark.parametrize(
    "second",
    [10**400, Fraction(10**400), Decimal("sNaN"), np.timedelta64(1, "Y")],
    ids=lambda second: type(second).__name__,
)
def test_seconds_that_are_none_are_rejected(second):
    rejected([(second, picture(0))], 1, "item 0 is not a (seconds, frame) pair")


def test_times_durations_and_sizes():
    frames = np.zeros((10, 6, 8, 3), np.uint8)
    array, pairs = open_source(frames, fps=4), open_source([(10 + 0.5 * i, frames[i]) for i in range(10)])
    for source, duration in ((array, 2.5), (pairs, 5.0)):
        assert (source.duration, source.frame_size) == (pytest.approx(duration), (6, 8))
    assert array.sample(4).seconds.tolist() == [0.0, 0.75, 1.5, 2.25]
    assert pairs.sample(1).seconds.tolist() == [0.0]


def test_a_folders_frame_size_is_that_of_the_first_image(tmp_path):
    image, exif = Image.new("RGB", (8, 6)), Image.Exif()
    exif[274] = 6  # turned by 90 degrees
    image.save(tmp_path / "0.jpg", exif=exif)
    (tmp_path / "1.jpg").write_bytes(b"no image")
    source = open_source(tmp_path, fps=2)
    assert (source.duration, source.frame_size) == (1.0, (8, 6))
    assert source.sample(2).seconds.tolist() == [0.0, 0.5]


def test_a_folder_of_images_in_natural_order(tmp_path):
    for i in range(12):
        Image.fromarray(picture(i)).save(tmp_path / f"frame{i}.{'png' if i % 2 else 'BMP'}")
    (tmp_path / "notes.txt").touch()
    assert [(s, number_in(rgb)) for s, rgb in sample(tmp_path, 12)] == [(float(i), i) for i in range(12)]
    assert [s for s, _ in sample(str(tmp_path), 2, fps=4)] == [0.0, 2.75]
    (tmp_path / "frame3.png").write_bytes(b"no image")
    rejected(tmp_path, 12, "frame3.png")
    rejected(tmp_path, 13, "has 12 frames")


def test_hidden_files_and_folders_are_no_frames(tmp_path):
    for i in range(3):
        Image.fromarray(picture(i)).save(tmp_path / f"{i}.png")
    Image.fromarray(picture(9)).save(tmp_path / ".thumb.png")
    (tmp_path / "more.png").mkdir()
    assert [number_in(rgb) for _, rgb in sample(tmp_path, 3)] == [0, 1, 2]
    rejected(tmp_path, 4, "has 3 frames")


@pytest.mark.parametrize("orientation", range(10))
def test_an_image_is_turned_as_its_exif_says(tmp_path, orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    exif[ExifTags.Base.ResolutionUnit] = 2
    corner = picture(5).copy()
    corner[:20, :12] = 200
    Image.fromarray(corner).save(tmp_path / "0.png", exif=exif)
    upright = ImageOps.exif_transpose(Image.open(tmp_path / "0.png")).convert("RGB")
    np.testing.assert_array_equal(next(sample(tmp_path, 1))[1], upright)
    assert (upright.size == (48, 64)) == (5 <= orientation <= 8)


@pytest.mark.parametrize(("tag", "kind", "count"), [(0x128, 1, 1), (0x11A, 2, 1), (0x112, 7, 4)])
def test_damaged_exif_data_do_not_damage_the_image(tmp_path, tag, kind, count):
    tags = b"Exif\0\0MM\0*\0\0\0\x08" + struct.pack(">HHHI", 1, tag, kind, count) + b"\2\0\0\0" + bytes(4)
    Image.fromarray(picture(5)).save(tmp_path / "0.jpg", quality=95)
    data = (tmp_path / "0.jpg").read_bytes()
    (tmp_path / "0.jpg").write_bytes(data[:2] + b"\xff\xe1" + struct.pack(">H", len(tags) + 2) + tags + data[2:])
    assert [number_in(rgb) for _, rgb in sample(tmp_path, 1)] == [5]


def test_only_kinds_of_images_that_start_no_program_are_read(tmp_path):
    (tmp_path / "0.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    rejected(tmp_path, 1, "0.png", "cannot identify")


def test_images_become_rgb(tmp_path):
    Image.fromarray(picture(5)[:, :, 0]).save(tmp_path / "0.png")
    Image.fromarray(picture(6)).convert("RGBA").save(tmp_path / "1.png")
    Image.fromarray(picture(7)).convert("P").save(tmp_path / "2.png")
    for i, (_, rgb) in enumerate(sample(tmp_path, 3)):
        np.testing.assert_array_equal(rgb, picture(5 + i))
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(tmp_path / "3.png")
    rejected(tmp_path, 4, "3.png", "8 bits")
    (tmp_path / "none").mkdir()
    rejected(tmp_path / "none", 1, "none", "no images")
