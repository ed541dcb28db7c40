"""A file, a folder of images, arrays, an iterable or a live stream → sampled frames with their times."""

from tango_runtime.video.batch import FrameBatch
from tango_runtime.video.live import LiveFrame, LiveSource
from tango_runtime.video.open import open_source, sample
from tango_runtime.video.source import (
    Clock,
    Frame,
    FrameSource,
    FrameStream,
    Rounding,
    Sampled,
    Sampling,
    Source,
    TimedFrame,
)

__all__ = [
    "Clock",
    "Frame",
    "FrameBatch",
    "FrameSource",
    "FrameStream",
    "LiveFrame",
    "LiveSource",
    "Rounding",
    "Sampled",
    "Sampling",
    "Source",
    "TimedFrame",
    "open_source",
    "sample",
]
