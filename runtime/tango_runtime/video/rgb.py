"""A decoded PyAV frame → RGB pixels as a player shows them: colors converted, the display matrix applied."""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import numpy as np

from tango_plugins import TangoError
from tango_runtime.video.source import Frame

#: Formats of 16 bits a pixel that FFmpeg 8 converts as if their bytes were the other way round.
_SWAPPED = {"rgb555be", "rgb565be", "bgr555be", "bgr565be"}


class Turn(NamedTuple):
    """Rows and columns are exchanged, then their order is reversed."""

    transpose: bool
    flip_rows: bool
    flip_columns: bool


def to_rgb(frame: Any, name: str) -> Frame:
    """Converts a frame to uint8 RGB [H, W, 3]; `name` is what messages call the file.

    Raises:
        TangoError: FFmpeg cannot convert the frame's colors.
    """
    try:
        if frame.format.name in _SWAPPED:
            rgb: Frame = frame.reformat(format=frame.format.name[:-2] + "le").to_ndarray(format="rgb24")
        else:
            rgb = frame.to_ndarray(format="rgb24")
    except OSError as error:
        raise TangoError(
            f"the colors of {name} cannot be converted (pixel format {frame.format.name}, color space "
            f"{int(frame.colorspace)}): {error.strerror}",
            "convert the file: ffmpeg -i IN -vf scale=out_color_matrix=bt709 -colorspace bt709 OUT.mp4",
        ) from error
    turn = turn_of(frame)
    if turn.transpose:
        rgb = rgb.transpose(1, 0, 2)
    return np.ascontiguousarray(rgb[:: -1 if turn.flip_rows else 1, :: -1 if turn.flip_columns else 1])


def shown_size(frame: Any) -> tuple[int, int]:
    """(height, width) in pixels of what :func:`to_rgb` gives."""
    return (frame.width, frame.height) if turn_of(frame).transpose else (frame.height, frame.width)


def turn_of(frame: Any) -> Turn:
    """What shows a frame upright."""
    (a, b), (c, d) = _display_matrix(frame)
    if abs(b) + abs(c) > abs(a) + abs(d):
        return Turn(transpose=True, flip_rows=b < 0, flip_columns=c < 0)
    return Turn(transpose=False, flip_rows=d < 0, flip_columns=a < 0)


def _display_matrix(frame: Any) -> tuple[tuple[int, int], tuple[int, int]]:
    """((a, b), (c, d)): pixel (x, y) is shown at (a·x + c·y, b·x + d·y), up to a shift (ISO/IEC 14496-12)."""
    from av.sidedata.sidedata import SideDataContainer

    # Not frame.side_data: that refers to the frame and the frame to it, so that its pixels and the threads of its
    # decoder would stay until Python collects cycles.
    found = SideDataContainer.__new__(SideDataContainer)
    # PyAV stops at a kind that it does not know, such as the EXIF data of a camera's JPEG. The matrix is before it.
    with contextlib.suppress(ValueError):
        found.__init__(frame)  # type: ignore[misc]
    data = found.get("DISPLAYMATRIX")
    if data is None:
        return (1, 0), (0, 1)
    a, b, _, c, d, *_ = np.frombuffer(data, np.int32).tolist()
    return (a, b), (c, d)
