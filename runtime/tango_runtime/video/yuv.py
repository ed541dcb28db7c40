"""Frames that the GPU decoded, in its memory, before their colors are converted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tango_plugins.resize import NV12, P010
from tango_runtime.video.rgb import Turn, turn_of

#: Pixel formats of a GPU's decoder, and what tango/frames.h calls them.
_FORMATS = {"nv12": NV12, "p010le": P010}

#: MatrixCoefficients of ITU-T H.273 that tango/frames.h converts by.
_MATRICES = (1, 2, 4, 5, 6, 7, 9)

#: PyAV's number of the range in which black is 0, as in JPEG.
_FULL_RANGE = 2


class HardwareError(Exception):
    """The GPU's decoder does not do it: the text says why."""


@dataclass(frozen=True, eq=False)
class YuvFrame:
    """A frame in device memory, luma and interleaved chroma of half its size, as a GPU's decoder gives it.

    Attributes:
        format: NV12 or P010 of :mod:`tango_plugins.resize`.
        image: Address of the luma.
        chroma: Address of the chroma.
        pitch: Bytes from a row to the next, of both.
        rows: Of the luma as it is stored.
        columns: Of the luma as it is stored.
        matrix: MatrixCoefficients of ITU-T H.273.
        full_range: Whether black is 0, not 16.
        turn: What shows it upright.
        owner: Keeps the memory.
    """

    format: int
    image: int
    chroma: int
    pitch: int
    rows: int
    columns: int
    matrix: int
    full_range: bool
    turn: Turn
    owner: Any

    @classmethod
    def of(cls, frame: Any) -> YuvFrame:
        """A PyAV frame on the device, which is not copied.

        Raises:
            HardwareError: It is somewhere else, or in a form that is not converted on the device.
        """
        if frame.format.name != "cuda":
            raise HardwareError(f"the GPU does not decode this kind of it ({frame.format.name})")
        name, matrix = frame.sw_format.name, int(frame.colorspace)
        if name not in _FORMATS or matrix not in _MATRICES:
            raise HardwareError(f"frames of pixel format {name} and color space {matrix} are not converted on the GPU")
        luma, chroma = frame.planes
        if luma.line_size != chroma.line_size or luma.line_size <= 0:
            raise HardwareError(f"rows of luma and chroma are {luma.line_size} and {chroma.line_size} bytes apart")
        return cls(
            *(_FORMATS[name], luma.buffer_ptr, chroma.buffer_ptr, luma.line_size, frame.height, frame.width),
            *(matrix, int(frame.color_range) == _FULL_RANGE, turn_of(frame), frame),
        )

    @property
    def shown(self) -> tuple[int, int]:
        """(height, width) as it is shown."""
        return (self.columns, self.rows) if self.turn.transpose else (self.rows, self.columns)
