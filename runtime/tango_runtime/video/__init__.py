"""A file, a folder of images, arrays or an iterable → sampled frames with their times."""

from tango_runtime.video.file import Frame, Source, TimedFrame, sample

__all__ = ["Frame", "Source", "TimedFrame", "sample"]
