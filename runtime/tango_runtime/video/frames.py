"""Sources that give any frame by its index: arrays, iterables and folders of images."""

from __future__ import annotations

import datetime
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import cached_property
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image

from tango_plugins import TangoError
from tango_plugins.device_array import DeviceArray, is_on_device
from tango_runtime.video.source import Frame, Rounding, Sampled, TimedFrame, choose, choose_at, duration_of, is_uint8

#: What an image may be, whatever its name. Pillow would start other programs for some kinds.
_KINDS = ("PNG", "JPEG", "BMP", "WEBP", "GIF", "TIFF")

_IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp"}

#: EXIF orientation → what shows the image upright.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True, eq=False)
class IndexedFrames:
    """A FrameSource that gives any frame by its index.

    Attributes:
        name: What messages call it.
        seconds: float64 [n], time of each frame since the first.
        duration: Seconds from the first frame to the end of the last.
        frame: Index → uint8 RGB [H, W, 3].
    """

    name: str
    seconds: NDArray[np.float64]
    duration: float
    frame: Callable[[int], Frame]

    @cached_property
    def frame_size(self) -> tuple[int, int] | None:
        """(height, width) in pixels of the first frame; of a folder it reads that image."""
        if not len(self.seconds):
            return None
        height, width, _ = self.frame(0).shape
        return height, width

    def sample(self, count: int, *, rounding: Rounding = "floor") -> Sampled:
        """Chooses the frames ``linspace(0, n - 1, count)``."""
        return choose(self.seconds, count, rounding, self.name)

    def sample_at(self, fps: float) -> Sampled:
        """Chooses the first frame of every 1 / fps seconds."""
        return choose_at(self.seconds, fps, self.name)

    def read(self, chosen: Sampled) -> Iterator[TimedFrame]:
        """Gives the chosen frames, each when it is asked for."""
        for i, seconds in zip(chosen.indices.tolist(), chosen.seconds.tolist(), strict=True):
            yield seconds, self.frame(i)


def from_array(array: NDArray[np.uint8], fps: float) -> IndexedFrames:
    """An array of frames uint8 RGB [N, H, W, 3]; frame i is at i / fps seconds.

    Raises:
        TangoError: The array has another dtype or shape.
    """
    if not is_uint8(array) or len(array.shape) != 4 or array.shape[-1] != 3:
        raise TangoError(
            f"the frames are an array of {array.dtype} {list(array.shape)}", "give uint8 RGB frames [N, H, W, 3]"
        )
    return _at_rate("the array", len(array), fps, array.__getitem__)


def from_folder(folder: Path, fps: float) -> IndexedFrames:
    """A folder of images in natural order, ``frame2`` before ``frame10``; image i is at i / fps seconds.

    Raises:
        TangoError: There are no images.
    """
    images = sorted(filter(_is_image, folder.iterdir()), key=_natural)
    if not images:
        raise TangoError(f"{folder} holds no images", f"put {', '.join(sorted(_IMAGE_SUFFIXES))} files there")
    return _at_rate(str(folder), len(images), fps, lambda i: _read_image(images[i]))


def from_pairs(pairs: Iterable[TimedFrame], name: str = "the source") -> IndexedFrames:
    """Frames with a time each.

    Args:
        pairs: (seconds, uint8 RGB frame [H, W, 3]), times ascending. A sequence is used as it is. Any other iterable
            is read to its end into memory, and each frame is copied because it may be the same buffer every time.
        name: What messages call them.

    Raises:
        TangoError: An item is something else, the times do not ascend, or frames of a sequence are one buffer.
    """
    frames: Sequence[TimedFrame] | None = pairs if isinstance(pairs, Sequence) else None
    copies: list[Frame] = []
    buffers: dict[int, int] = {}
    times: list[float] = []
    before = -math.inf
    for i, item in enumerate(pairs):
        seconds, frame = check_pair(item, i)
        if not before < seconds < math.inf:
            raise TangoError(
                f"timestamps do not ascend: frame {i} is at {seconds:g} s after {before:g} s",
                "give frames in order of time, each with a later time than the one before",
            )
        before = seconds
        times.append(seconds)
        if frames is None:
            copies.append(copy_frame(frame))
        elif (same := buffers.setdefault(_address(frame), i)) != i:
            raise TangoError(f"frames {same} and {i} are the same memory", "give copies: frame.copy()")
    since_first = np.array(times) - (times[0] if times else 0.0)
    return IndexedFrames(
        name, since_first, duration_of(since_first), copies.__getitem__ if frames is None else lambda i: frames[i][1]
    )


def _at_rate(name: str, n: int, fps: float, frame: Callable[[int], Frame]) -> IndexedFrames:
    return IndexedFrames(name, np.arange(n) / fps, n / fps, frame)


def check_pair(item: object, i: int) -> TimedFrame:
    """Item i of an iterable, once it is known to be a (seconds, frame) pair.

    Raises:
        TangoError: It is something else, or its frame is no uint8 RGB [H, W, 3].
    """
    seconds = _seconds(item[0]) if isinstance(item, tuple) and len(item) == 2 else None
    if not isinstance(item, tuple) or seconds is None:
        raise TangoError(f"item {i} is not a (seconds, frame) pair", "give (float, uint8 RGB array [H, W, 3]) pairs")
    frame = item[1]
    is_array = isinstance(frame, np.ndarray) or is_on_device(frame)
    if not (is_array and is_uint8(frame) and len(frame.shape) == 3 and frame.shape[-1] == 3):
        what = f"{frame.dtype} {list(frame.shape)}" if is_array else type(frame).__name__
        raise TangoError(f"frame {i} is {what}", "give uint8 RGB frames [H, W, 3]")
    return seconds, frame


def copy_frame(frame: Any) -> Frame:
    """A copy of a frame, where it is."""
    copy: Frame = frame.clone() if hasattr(frame, "clone") else frame.copy()  # torch; NumPy and CuPy
    return copy


def _address(frame: Frame) -> int:
    return DeviceArray.of(frame).address if is_on_device(frame) else frame.ctypes.data


def _seconds(time: object) -> float | None:
    """Seconds of a real number, a fraction or a time difference; None for anything else."""
    try:
        if isinstance(time, np.timedelta64):  # before Real: NumPy registers it as an integer of its own unit
            return float(time / np.timedelta64(1, "s"))
        if isinstance(time, datetime.timedelta):
            return time.total_seconds()
        return float(time) if isinstance(time, (Real, Decimal)) else None
    except (OverflowError, ValueError, TypeError):  # too large, a signaling NaN, years
        return None


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in _IMAGE_SUFFIXES and not path.name.startswith(".") and path.is_file()


def _natural(path: Path) -> list[str | int]:
    # The capturing group makes split alternate text and digits, so equal places compare equal types.
    return [int(part) if part.isdecimal() else part for part in re.split(r"([0-9]+)", path.name.lower())]


def _read_image(path: Path) -> Frame:
    try:
        with Image.open(path, formats=_KINDS) as image:
            if image.mode.startswith(("I", "F")):  # Pillow would clip these to white instead of scaling them
                raise TangoError(f"{path} has pixels of more than 8 bits", "convert it to 8 bits per channel")
            return np.array(upright(image))
    except TangoError:
        raise
    except Exception as error:  # a damaged image may raise anything
        raise TangoError(f"{path} cannot be read as an image: {error}", "replace or remove the file") from error


def upright(image: Image.Image) -> Image.Image:
    """An image in RGB, turned as its EXIF data says."""
    rgb, turn = image.convert("RGB"), _turn(image)
    return rgb if turn is None else rgb.transpose(turn)


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What shows the image upright. Pillow's exif_transpose rewrites the EXIF data and fails on other tags in it."""
    try:
        return _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged EXIF data: viewers show such an image as it is stored
        return None
