"""A file, a folder of images, arrays or an iterable → sampled frames with their times."""

from tango_runtime.video.batch import FrameBatch
from tango_runtime.video.open import open_source, sample
from tango_runtime.video.source import Clock, Frame, FrameSource, FrameStream, Rounding, Sampled, Source, TimedFrame

__all__ = [
    "Clock",
    "Frame",
    "FrameBatch",
    "FrameSource",
    "FrameStream",
    "Rounding",
    "Sampled",
    "Source",
    "TimedFrame",
    "open_source",
    "sample",
]
