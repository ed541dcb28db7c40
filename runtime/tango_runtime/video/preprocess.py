"""Frames of any size → the uint8 frames that the vision graph takes, equal to the checkpoint's own image processor."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tango_plugins import TangoError
from tango_plugins.device_array import is_on_device
from tango_runtime.video.batch import FrameBatch
from tango_runtime.video.source import Frame, FrameStream, TimedFrame, is_uint8

#: Frames that are resized at a time, each on its own thread while the source decodes the next: Pillow and FFmpeg
#: release the GIL. Large ones are fewer, so that they take no more than so many bytes, unless a single one does.
_AT_ONCE, _MAX_BYTES = 8, 1 << 28


def resize(rgb: Frame, size: tuple[int, int]) -> Frame:
    """Resizes a frame straight to a size: bicubic, the aspect ratio is not kept, nothing is cropped or padded.

    Pixel for pixel what SigLIP's processors give, LLaVA-NeXT's (siglip_encoder.py) and the PIL-based one of
    transformers: Pillow's bicubic filter, whose support widens with the reduction, rounded to uint8. transformers'
    torchvision path takes torch's bicubic with antialias: that differs on uint8 by one level on most shapes, and by at
    most 5 levels, 0.24 on average, on 480×720 portrait frames (torch 2.13; torchvision itself was not at hand).

    Args:
        rgb: uint8 [H, W, 3].
        size: (height, width) in pixels, each at least 1.

    Returns:
        uint8 [height, width, 3]; `rgb` itself where it has that size already.

    Raises:
        TangoError: `rgb` has another dtype or shape, or no pixels, or `size` is below 1.
    """
    height, width = size
    if height < 1 or width < 1:
        raise TangoError(f"the frame size is {height}×{width}", "it must be a positive number of pixels")
    check_frame(rgb)
    if is_on_device(rgb):
        raise TangoError("a frame is on a GPU, and is wanted on the host", "copy it, or use a backend on that GPU")
    if rgb.shape[:2] == (height, width):
        return rgb
    return np.array(Image.fromarray(rgb).resize((width, height), Image.Resampling.BICUBIC))


def check_frame(rgb: Frame) -> None:
    """Rejects what is no uint8 RGB frame [H, W, 3] with pixels, wherever it is."""
    shape = tuple(rgb.shape)
    if not is_uint8(rgb) or len(shape) != 3 or shape[-1] != 3 or 0 in shape:
        raise TangoError(f"a frame is {rgb.dtype} {list(shape)}", "give uint8 RGB frames [H, W, 3]")


def preprocess(frames: Iterable[TimedFrame], size: tuple[int, int], out: NDArray[np.uint8] | None = None) -> FrameBatch:
    """Resizes what ``FrameSource.read`` yields, with few frames of the source in memory at a time.

    The vision graph itself does x / 255 and (x − mean) / std.

    Args:
        frames: (seconds, uint8 RGB frame [H, W, 3]), at least one; frames may differ in H and W.
        size: (height, width) in pixels that the vision graph takes.
        out: Where the frames are put, uint8 [F, height, width, 3]; None allocates an array.

    Raises:
        TangoError: There is no frame, or `resize` rejects one.
    """
    with ThreadPoolExecutor(_AT_ONCE) as threads:
        resizer = _Resizer(threads, size)
        if isinstance(frames, FrameStream):
            resized = list(frames.each(resizer))
        else:
            resized = [(time, resizer(rgb)) for time, rgb in frames]
    if not resized:
        raise TangoError("there are no frames", "sample at least one frame")
    seconds = np.array([time for time, _ in resized], np.float32)
    return FrameBatch(np.stack([frame() for _, (_, frame) in resized], out=out), seconds, resized[0][1][0])


class _Resizer:
    """Resizes frames on threads; several threads may call it, and wait where too many frames are under way.

    Returns:
        (width over height of the frame, what waits for the resized one).
    """

    def __init__(self, threads: ThreadPoolExecutor, size: tuple[int, int]) -> None:
        self._threads, self._size = threads, size
        self._bytes, self._changed = 0, threading.Condition()

    def __call__(self, rgb: Frame) -> tuple[float, Callable[[], Frame]]:
        check_frame(rgb)
        height, width = rgb.shape[:2]
        aspect = width / height
        if (height, width) == tuple(self._size):  # nothing to do is not worth a thread
            return aspect, partial(resize, rgb, self._size)
        share = max(int(np.prod(rgb.shape)), _MAX_BYTES // _AT_ONCE)
        with self._changed:
            self._changed.wait_for(lambda: not self._bytes or self._bytes + share <= _MAX_BYTES)
            self._bytes += share
        return aspect, self._threads.submit(self._resize, rgb, share).result

    def _resize(self, rgb: Frame, share: int) -> Frame:
        try:
            return resize(rgb, self._size)
        finally:
            with self._changed:
                self._bytes -= share
                self._changed.notify_all()
