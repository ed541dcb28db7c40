"""Any source → a FrameSource: the one place that distinguishes files, folders, streams, arrays and iterables."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray

from tango_plugins import TangoError
from tango_plugins.device_array import is_on_device
from tango_runtime.video.address import exists, is_live, is_video_device
from tango_runtime.video.file import VideoFile
from tango_runtime.video.frames import from_array, from_folder, from_pairs
from tango_runtime.video.live import FirstFrames
from tango_runtime.video.source import FrameSource, FrameStream, Rounding, Sampling, Source, check_count


def open_source(source: Source, fps: float | None = None, sampling: Sampling = "exact") -> FrameSource:
    """Opens a source and learns its times.

    A video file is decoded for that only where its packets do not determine its frames; a warning says so.

    Args:
        source: What to open:

            - the path of a video file;
            - the path of a folder of images, taken in natural order (``frame2`` before ``frame10``);
            - a live stream, as a string, whose first frames are taken when it is sampled: an address, ``rtsp://…``,
              ``http://…`` or ``https://…``; a camera of this machine, ``v4l2:/dev/video0`` or that path alone;
              ``gst:PIPELINE``, a pipeline of GStreamer that ends in raw video; ``csi:0``, a camera at a Jetson's port;
              ``-``, standard input. A file or folder of that name goes first;
            - a uint8 array [N, H, W, 3] of RGB frames, on the host or, with ``__cuda_array_interface__`` or
              ``__dlpack__``, on the GPU of the backend that takes them;
            - a finite iterable of (seconds, uint8 RGB frame [H, W, 3]), times ascending. Its length must be known, so
              whatever is not a sequence is first copied into memory to its end: 6 MB a frame at 1920×1080. Seconds may
              be any real number, a fraction or a ``datetime.timedelta``;
            - a FrameSource, which is returned as it is.
        fps: Frames per second of a folder or an array, which have no times: frame i is at i / fps seconds; or that are
            taken of a live stream. 1.0 where not given.
        sampling: Which frames sampling takes; ``keyframes`` is for video files.

    Raises:
        TangoError: The source cannot be read, is truncated, its times do not ascend, or `fps` is given for a source
            that has times of its own.
    """
    if isinstance(source, Path) and is_video_device(source):
        source = str(source)
    stream = isinstance(source, str) and is_live(source)
    is_file = isinstance(source, (str, Path)) and not stream
    if sampling == "keyframes" and not (is_file and not _is_folder(cast("str | Path", source))):
        raise TangoError("only video files have keyframes", "leave sampling by keyframes out")
    if fps is not None and not (math.isfinite(fps) and fps > 0):
        raise TangoError(f"fps is {fps}", "it must be a positive number of frames per second")
    if isinstance(source, str) and not source:
        raise TangoError("the path of the video is empty", "give the path of a video file or of a folder of images")
    if isinstance(source, np.ndarray) or is_on_device(source):
        return from_array(cast("NDArray[np.uint8]", source), fps or 1.0)
    if stream:
        return FirstFrames(cast(str, source), fps)
    if isinstance(source, (str, Path)) and _is_folder(source):
        return from_folder(Path(source), fps or 1.0)
    if fps is not None:
        raise TangoError(
            f"fps={fps:g} was given for a source that has times of its own",
            "omit fps; it is for folders of images, arrays and live streams",
        )
    if isinstance(source, (str, Path)):
        return VideoFile(Path(source), sampling)
    if hasattr(source, "sample") and hasattr(source, "read"):
        return cast(FrameSource, source)
    if isinstance(source, Iterable):
        return from_pairs(source)
    raise TangoError(
        f"the source is of type {type(source).__name__}",
        "give the path of a video or a folder of images, an array, an iterable of (seconds, frame) pairs, or a stream",
    )


def _is_folder(path: str | Path) -> bool:
    return exists(path) and Path(path).is_dir()


def sample(
    source: Source,
    count: int,
    *,
    fps: float | None = None,
    rounding: Rounding = "floor",
    sampling: Sampling = "exact",
) -> FrameStream:
    """Samples exactly `count` frames at the indices ``linspace(0, n - 1, count)`` of the n frames of `source`.

    Seconds count from the first frame. A video is read twice: its packets first, without decoding, for the number of
    frames and their times; then, before the first frame is given, only what the chosen ones depend on is decoded. They
    are those that decoding the whole video gives; damage in a part that no chosen frame needs stays unnoticed.

    Args:
        source: What to sample; see :func:`open_source`.
        count: Number of frames, at least 1.
        fps: Frames per second of a folder, an array or a live stream.
        rounding: How the indices become integers; see :func:`tango_runtime.video.source.choose`.
        sampling: ``keyframes`` takes, of a video file, the keyframe nearest in time to each of these, and decodes
            no others. One may be nearest to several. ``FrameStream.off`` says how far off they are.

    Returns:
        An iterator of (seconds, uint8 RGB frame [H, W, 3]) in order of time; rotation metadata is applied. Its
        ``clock`` has all times, and how long the source is.

    Raises:
        TangoError: As :func:`open_source`, or there are fewer frames than `count`. A frame that cannot be read raises
            when it is reached; everything else before the first frame.
    """
    check_count(count)
    opened = open_source(source, fps, sampling)
    return FrameStream(opened, opened.sample(count, rounding=rounding))
