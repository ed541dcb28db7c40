"""A video that was decoded before its session begins: in another process, or for several bundles."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tango_runtime.bundle import Manifest
from tango_runtime.video.batch import FrameBatch
from tango_runtime.video.preprocess import preprocess
from tango_runtime.video.shape import ClipShape, FrameOptions, open_clip
from tango_runtime.video.source import Clock, FrameStream, Source


@dataclass(frozen=True, eq=False)
class DecodedVideo:
    """The sampled frames of a video, decoded and resized, in the host's memory; it can be pickled.

    Attributes:
        batch: The frames.
        shape: What they become.
        clock: When they are.
        off: [F] float64, seconds by which each keyframe is after the frame of exact sampling; None where that is used.
    """

    batch: FrameBatch
    shape: ClipShape
    clock: Clock
    off: NDArray[np.float64] | None


def decode(
    manifest: Manifest,
    source: Source,
    options: FrameOptions,
    fixed: tuple[int, int] | None = None,
    load: Callable[[FrameStream, int, tuple[int, int]], FrameBatch] | None = None,
) -> DecodedVideo:
    """Decodes what a bundle samples of a video; needs no backend.

    Arguments and errors are those of :func:`tango_runtime.video.shape.open_clip`. ``load`` reads the sampled frames,
    so many of them, and makes them frames of a size (height, width) on the host; by default in software.
    """
    timed, shape = open_clip(manifest, source, options, fixed)
    batch = load(timed, shape.frames, shape.size) if load else preprocess(timed, shape.size)
    return DecodedVideo(batch, shape, timed.clock, timed.off)
