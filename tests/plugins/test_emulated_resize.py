"""The CUDA library's resize in the CUDA emulator: Pillow's and FFmpeg's values."""

from __future__ import annotations

import av
import numpy as np
import pytest
from PIL import Image

from tango_plugins import TangoError, native_library, resize
from tango_plugins.structs import TangoResizeShape, TangoResizeTensors
from tests.plugins.cuda_emulator import compiled
from tests.plugins.resizes import MATRICES, SIZES, SURFACES, TURNS, Frames, Shape, check

pytestmark = pytest.mark.nvcc


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return compiled(tmp_path_factory.mktemp("resize"), "resize")


@pytest.mark.parametrize("size", SIZES)
def test_rgb_equals_pillow(path, size):
    check(Frames(Shape(*size), path=path, device="cpu"))


@pytest.mark.parametrize("turn", TURNS)
def test_a_frame_is_turned_before_it_is_resized(path, turn):
    check(Frames(Shape(15, 22, 10, 9, turn=turn), path=path, device="cpu"))


def test_several_frames_with_gaps(path):
    check(Frames(Shape(15, 22, 10, 9, frames=3, gap=5, gap_rows=2), path=path, device="cpu"))


@pytest.mark.parametrize("shape", SURFACES, ids=str)
def test_luma_and_chroma(path, shape):
    check(Frames(shape, path=path, device="cpu"))


@pytest.mark.parametrize("full_range", [0, 1])
@pytest.mark.parametrize("matrix", MATRICES)
def test_nv12_is_within_a_level_of_ffmpeg(path, matrix, full_range):
    """FFmpeg reads the same luma and chroma in three planes, as a decoder gives them."""
    shape = Shape(48, 64, 20, 28, format=resize.NV12, matrix=matrix, full_range=full_range)
    frames = Frames(shape, path=path, device="cpu")
    (luma,), (chroma,) = frames.planes
    picture = av.VideoFrame(64, 48, "yuv420p")
    for plane, values in zip(picture.planes, (luma, chroma[..., 0], chroma[..., 1]), strict=True):
        rows = np.zeros((plane.height, plane.line_size), np.uint8)
        rows[:, : plane.width] = values
        plane.update(rows.tobytes())
    picture.colorspace, picture.color_range = matrix, 2 if full_range else 1
    rgb = Image.fromarray(picture.to_ndarray(format="rgb24"))
    frames.enqueue()
    distance = np.abs(frames.result()[0].astype(int) - np.asarray(rgb.resize((28, 20), Image.Resampling.BICUBIC)))
    assert (distance <= 1).mean() >= 0.999


def test_no_frames(path):
    frames = Frames(Shape(4, 4, 2, 2), path=path, device="cpu")
    library, shape = native_library.load(path), frames.described
    shape.frames = 0
    assert library.tango_resize_enqueue(shape, TangoResizeTensors(), None, 0, None) == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"frames": -1}, "frames is -1"),
        ({"format": 3}, "format is 3: it must be from 0 to 2"),
        ({"rows": 0}, "rows is 0"),
        ({"columns": 65537}, "columns is 65537: it must be from 1 to 65536"),
        ({"out_rows": 0}, "out_rows is 0"),
        ({"out_columns": 0}, "out_columns is 0"),
        ({"pitch": 65}, "pitch is 65: it must be from 66"),
        ({"format": 2, "pitch": 45}, "pitch is 45: it must be even"),
        ({"frames": 2, "frame_rows": 14}, "frame_rows is 14: it must be from 15"),
        ({"format": 1, "matrix": 0}, "matrix is 0"),
        ({"format": 1, "matrix": 3}, "matrix is 3: it must be 1, 2, 4, 5, 6, 7 or 9"),
        ({"full_range": 2}, "full_range is 2"),
        ({"transpose": 2}, "transpose is 2"),
        ({"flip_rows": -1}, "flip_rows is -1"),
        ({"flip_columns": 2}, "flip_columns is 2"),
        ({"columns_first": 2}, "columns_first is 2"),
    ],
)
def test_a_wrong_shape_is_rejected_by_name(path, change, words):
    with pytest.raises(TangoError, match="cannot resize frames") as error:
        Frames(Shape(15, 22, 10, 9), path=path, device="cpu").enqueue(**change)
    assert words in error.value.message


@pytest.mark.parametrize("missing", ["shape", "tensors", "image", "chroma", "resized", "workspace"])
def test_null_arguments_are_rejected_by_name(path, missing):
    library, held = native_library.load(path), np.zeros(1 << 16, np.uint8)
    here = held.ctypes.data + -held.ctypes.data % 256
    shape = TangoResizeShape(1, resize.NV12, 4, 4, 4, 6, 1, 0, 0, 0, 0, 2, 2, 0)
    tensors = TangoResizeTensors(**{name: here for name in ("image", "chroma", "resized") if name != missing})
    given = [None if missing == "shape" else shape, None if missing == "tensors" else tensors]
    assert library.tango_resize_enqueue(*given, None if missing == "workspace" else here, 60_000, None) != 0
    assert library.tango_last_error() == f"{missing} is null".encode()


def test_a_workspace_that_is_too_small_is_rejected(path):
    library, held = native_library.load(path), np.zeros(1 << 12, np.uint8)
    here = held.ctypes.data + -held.ctypes.data % 256
    shape = TangoResizeShape(1, resize.RGB24, 4, 4, 12, 4, 1, 0, 0, 0, 0, 2, 2, 0)
    size = resize.workspace_bytes(shape, path)
    assert library.tango_resize_enqueue(shape, TangoResizeTensors(here, None, here), here, size - 1, None) == 2
    assert library.tango_last_error() == f"workspace has {size - 1} bytes: it must have {size}".encode()
