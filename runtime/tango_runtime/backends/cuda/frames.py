"""Frames on their way to the vision graph: large ones, and those that are on the GPU already, are resized there.

The values are those of the host's resize, bit for bit. A frame crosses as it is: 6 MB at 1920×1080, which takes less
time than its resize on a thread of the host.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain, cycle
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tango_plugins import TangoError, native_library
from tango_plugins.device_array import DeviceArray, is_on_device
from tango_plugins.resize import NV12, RGB24, columns_first, enqueue, workspace_bytes
from tango_plugins.structs import TangoResizeShape
from tango_runtime.backends.cuda.device import HostPool, Pool, Stream, check, cudart, rows
from tango_runtime.video.batch import FrameBatch
from tango_runtime.video.preprocess import check_frame, preprocess
from tango_runtime.video.source import Frame, FrameStream, TimedFrame
from tango_runtime.video.yuv import HardwareError, YuvFrame

_log = logging.getLogger("tango_runtime.video")

#: Large frames that are resized at once, a part: so many at most, and of so many bytes, unless a single one has more.
_PART, _PART_BYTES = 4, 1 << 25

#: Parts that are on their way at a time: while the oldest crosses, the host's threads copy the others.
_PARTS = 4

#: Threads that copy frames. As many saturate the memory of a server's host; sixteen take longer.
_THREADS = 8

#: A frame of at least so many times the pixels that the vision graph takes is large.
_LARGE = 2


@contextmanager
def _blocking_waits() -> Iterator[None]:
    """The device's context as FFmpeg shares it, whose threads sleep while they wait: else it says "not supported"."""
    runtime = cudart()
    flags = check(runtime.cudaGetDeviceFlags())
    check(runtime.cudaSetDeviceFlags(runtime.cudaDeviceScheduleBlockingSync))
    try:
        yield
    finally:
        check(runtime.cudaSetDeviceFlags(flags))


@dataclass
class _Part:
    """Frames of one shape on their way from the host."""

    copies: Sequence[Future[None]]
    pinned: NDArray[np.uint8]  # [n, height, width, 3]
    source: DeviceArray  # the same on the device
    resized: DeviceArray  # [n, H, W, 3]


def _parts(timed: Iterable[TimedFrame]) -> Iterator[tuple[list[float], list[Any]]]:
    """Times and frames, as many as are resized at once: of one shape, all on the host or all on the device."""
    times: list[float] = []
    frames: list[Any] = []
    for time, given in timed:
        check_frame(given)
        frame = DeviceArray.of(given, "a frame") if is_on_device(given) else given
        full = len(frames) >= _PART or (len(frames) + 1) * math.prod(frame.shape) > _PART_BYTES
        if frames and (full or (type(frame), frame.shape) != (type(frames[0]), frames[0].shape)):
            yield times, frames
            times, frames = [], []
        times.append(time)
        frames.append(frame)
    if frames:
        yield times, frames


class FrameLoader:
    """Makes a video's frames what the vision graph takes.

    Args:
        stream: The stream of the vision graph.
        pool: Memory on the device.
        nvdec: Whether the GPU decodes video files that it can decode.
        decoders: Its decoders that work on a file at a time, at most; None takes what is fastest for one file.
        exact: Whether it leaves files of 10 bits to software, which converts them more coarsely.
    """

    def __init__(
        self,
        stream: Stream,
        pool: Pool,
        *,
        nvdec: bool = False,
        decoders: int | None = None,
        exact: bool = False,
    ) -> None:
        self._stream, self._pool, self._nvdec, self._decoders = stream, pool, nvdec, decoders
        self._exact = exact
        self._batches, self._staging = HostPool(), HostPool()
        self._threads = ThreadPoolExecutor(_THREADS)  # which start when they are first needed
        self._said: set[str] = set()  # why files were decoded in software

    def __call__(self, timed: Iterable[TimedFrame], count: int, size: tuple[int, int]) -> FrameBatch:
        """Sampled frames → a batch of (height, width) ``size``, on the device if the first of them is large or there.

        Raises:
            TangoError: A frame is no uint8 RGB [H, W, 3], or there is none.
        """
        if self._nvdec and isinstance(timed, FrameStream):
            with _blocking_waits():
                batch = self._decode(timed, count, size)
            if batch:
                return batch
        frames = iter(timed)
        first = next(frames, None)
        if first is None:
            raise TangoError("there are no frames", "sample at least one frame")
        frames, (height, width) = chain([first], frames), first[1].shape[:2]
        if is_on_device(first[1]) or height * width >= _LARGE * size[0] * size[1]:
            return self._resize(frames, self._pool.take("frames", (count, *size, 3), np.uint8), width / height)
        return preprocess(frames, size, self._batches.take((count, *size, 3), np.uint8))

    def _decode(self, stream: FrameStream, count: int, size: tuple[int, int]) -> FrameBatch | None:
        """Frames that the GPU decodes; None where it does not, which is said."""
        resized, aspect = self._pool.take("frames", (count, *size, 3), np.uint8), 1.0
        try:
            decoded = stream.decode_on(check(cudart().cudaGetDevice()), self._decoders)
            if decoded is None:
                return None
            for i, frame in decoded:
                if self._exact and frame.format != NV12:
                    raise HardwareError("software converts its 10 bits otherwise")
                check(cudart().cudaDeviceSynchronize())  # the decoder's copy of it, on a stream of its own
                self._enqueue_yuv(frame, rows(resized, i, i + 1))
                self._stream.synchronize()  # the decoder writes to its memory again once it is given back
                if i == 0:
                    aspect = frame.shown[1] / frame.shown[0]
        except HardwareError as reason:
            level = logging.DEBUG if str(reason) in self._said else logging.WARNING
            _log.log(level, "%s is decoded in software: %s", stream.name, reason)
            self._said.add(str(reason))
            return None
        return FrameBatch(resized, np.asarray(stream.clock.seconds, np.float32), aspect)

    def _resize(self, timed: Iterable[TimedFrame], resized: DeviceArray, aspect: float) -> FrameBatch:
        seconds: list[float] = []
        waiting: deque[_Part] = deque()
        turns = cycle(range(_PARTS))
        for times, frames in _parts(timed):
            target = rows(resized, len(seconds), len(seconds) + len(times))
            seconds += times
            if isinstance(frames[0], DeviceArray):
                self._enqueue(self._gather(frames), target)
                continue
            if len(waiting) == _PARTS:
                self._upload(waiting[0])
                self._stream.synchronize()  # its memory is the next part's
                waiting.popleft()
            waiting.append(self._copy(frames, next(turns), target))
        for part in waiting:
            self._upload(part)
        self._stream.synchronize()
        return FrameBatch(resized, np.array(seconds, np.float32), aspect)

    def _copy(self, frames: Sequence[Frame], turn: int, resized: DeviceArray) -> _Part:
        """Starts copying frames of the host to pinned memory."""
        shape = (len(frames), *frames[0].shape)
        pinned, source = self._staging.take(shape, np.uint8), self._pool.take(f"source frames {turn}", shape, np.uint8)
        copies = [self._threads.submit(np.copyto, *pair) for pair in zip(pinned, frames, strict=True)]
        return _Part(copies, pinned, source, resized)

    def _upload(self, part: _Part) -> None:
        """Each frame crosses as soon as it is copied; then they are resized."""
        for i, copy in enumerate(part.copies):
            copy.result()
            self._stream.upload(part.pinned[i : i + 1], rows(part.source, i, i + 1))
        self._enqueue(part.source, part.resized)

    def _gather(self, frames: Sequence[DeviceArray]) -> DeviceArray:
        """Frames of the device in one tensor."""
        source = self._pool.take("source frames", (len(frames), *frames[0].shape), np.uint8)
        check(cudart().cudaDeviceSynchronize())  # whatever stream makes them
        for i, frame in enumerate(frames):
            self._stream.copy(replace(frame, shape=(1, *frame.shape)), rows(source, i, i + 1))
        self._stream.synchronize()  # their memory may be gone when the next ones come
        return source

    def _enqueue(self, source: DeviceArray, resized: DeviceArray) -> None:
        """Resizes frames [n, height, width, 3] on the stream into [n, H, W, 3]."""
        _, height, width, _ = source.shape
        shape = {"format": RGB24, "rows": height, "columns": width, "pitch": 3 * width, "frame_rows": height}
        self._enqueue_shape(shape, (height, width), source.address, None, resized)

    def _enqueue_yuv(self, frame: YuvFrame, resized: DeviceArray) -> None:
        shape = {
            **{"format": frame.format, "rows": frame.rows, "columns": frame.columns, "pitch": frame.pitch},
            **{"matrix": frame.matrix, "full_range": frame.full_range, **frame.turn._asdict()},
        }
        self._enqueue_shape(shape, frame.shown, frame.image, frame.chroma, resized)

    def _enqueue_shape(
        self, source: dict[str, int], shown: tuple[int, int], image: int, chroma: int | None, resized: DeviceArray
    ) -> None:
        size = (resized.shape[1], resized.shape[2])
        out = {"out_rows": size[0], "out_columns": size[1], "columns_first": columns_first(shown, size)}
        shape = TangoResizeShape(frames=resized.shape[0], **source, **out)
        workspace = self._pool.take("resize", (workspace_bytes(shape),), np.uint8)
        enqueue(shape, image, chroma, resized, workspace, self._stream.handle)


class GpuDecoder:
    """Decodes video files on the GPU for another process: frames at the size that is wanted, on the host.

    What it gives of whole files is what software gives. One decoder works on a file, since other processes decode other
    files: it starts once for all of it.

    Raises:
        TangoError: There is no GPU, or no CUDA library.
    """

    def __init__(self) -> None:
        self._stream = Stream()
        native_library.load()
        self._load = FrameLoader(self._stream, Pool(), nvdec=True, decoders=1, exact=True)

    def __call__(self, timed: Iterable[TimedFrame], count: int, size: tuple[int, int]) -> FrameBatch:
        """Sampled frames → a batch of (height, width) ``size`` on the host; what the GPU does not decode, too.

        Raises:
            TangoError: A frame cannot be read, or there is none.
        """
        batch = self._load(timed, count, size)
        frames = batch.frames
        return replace(batch, frames=self._stream.download(frames)) if isinstance(frames, DeviceArray) else batch
