"""A file, a folder of images, arrays or an iterable → sampled frames with their times."""

from tango_runtime.video.batch import FrameBatch
from tango_runtime.video.open import open_source, sample
from tango_runtime.video.source import Frame, FrameSource, Rounding, Sampled, Source, TimedFrame

__all__ = [
    "Frame",
    "FrameBatch",
    "FrameSource",
    "Rounding",
    "Sampled",
    "Source",
    "TimedFrame",
    "open_source",
    "sample",
]
