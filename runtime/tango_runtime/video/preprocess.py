"""Sampled frames → the uint8 images that the vision graph takes, equal to the checkpoint's own image processor."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tango_plugins import TangoError

#: Source frames that are resized at a time, each by a thread of its own while the source gives the next: Pillow and
#: FFmpeg let go of the GIL.
_AT_ONCE = 8


def resize(rgb: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Resizes a frame straight to a square: bicubic, the aspect ratio is not kept, nothing is cropped or padded.

    Pixel for pixel what SigLIP's processors give, LLaVA-NeXT's (siglip_encoder.py) and the PIL-based one of
    transformers: Pillow's bicubic filter, whose support widens with the reduction, rounded to uint8. transformers'
    torchvision path takes torch's bicubic with antialias: that differs on uint8 by one level on most shapes, and by at
    most 5 levels, 0.24 on average, on 480×720 portrait frames (torch 2.13; torchvision itself was not at hand).

    Args:
        rgb: uint8 [H, W, 3].
        size: Side of the square in pixels, at least 1.

    Returns:
        uint8 [size, size, 3]; `rgb` itself where it has that size already.

    Raises:
        TangoError: `rgb` has another dtype or shape, or no pixels, or `size` is below 1.
    """
    if size < 1:
        raise TangoError(f"the image size is {size}", "it must be a positive number of pixels")
    if rgb.dtype != np.uint8 or rgb.ndim != 3 or rgb.shape[-1] != 3 or rgb.size == 0:
        raise TangoError(f"a frame is {rgb.dtype} {list(rgb.shape)}", "give uint8 RGB frames [H, W, 3]")
    if rgb.shape[:2] == (size, size):
        return rgb
    return np.array(Image.fromarray(rgb).resize((size, size), Image.Resampling.BICUBIC))


def preprocess(
    frames: Iterable[tuple[float, NDArray[np.uint8]]], size: int, out: NDArray[np.uint8] | None = None
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Resizes what `video.sample` yields, with few frames of the source in memory at a time.

    The vision graph itself does x / 255 and (x − mean) / std.

    Args:
        frames: (seconds, uint8 RGB frame [H, W, 3]), at least one; frames may differ in H and W.
        size: Side of the vision tower's square input in pixels.
        out: Where the images are put, [F, size, size, 3] uint8; None takes a new array.

    Returns:
        (uint8 images [F, size, size, 3], fp32 seconds [F]).

    Raises:
        TangoError: There is no frame, or `resize` refuses one.
    """
    images: list[Callable[[], NDArray[np.uint8]]] = []
    seconds: list[float] = []
    with ThreadPoolExecutor(_AT_ONCE) as threads:
        for time, rgb in frames:
            if len(images) >= _AT_ONCE:
                images[-_AT_ONCE]()  # waits
            fits = rgb.shape[:2] == (size, size)  # nothing to do is not worth a thread
            images.append(partial(resize, rgb, size) if fits else threads.submit(resize, rgb, size).result)
            seconds.append(time)
    if not images:
        raise TangoError("there are no frames", "sample at least one frame")
    return np.stack([image() for image in images], out=out), np.array(seconds, np.float32)
