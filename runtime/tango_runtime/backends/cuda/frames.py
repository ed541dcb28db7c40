"""Frames on their way to the vision graph: large ones, and those that are on the GPU already, are resized there.

The values are those of the host's resize, bit for bit. A frame crosses as it is: 6 MB at 1920×1080, which takes less
time than its resize on a thread of the host.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import chain

import numpy as np

from tango_plugins import TangoError
from tango_plugins.device_array import DeviceArray, is_on_device
from tango_plugins.resize import RGB24, columns_first, enqueue, workspace_bytes
from tango_plugins.structs import TangoResizeShape
from tango_runtime.backends.cuda.device import HostPool, Pool, Stream, check, cudart, rows
from tango_runtime.video.batch import FrameBatch
from tango_runtime.video.preprocess import check_frame, preprocess
from tango_runtime.video.source import Frame, FrameStream, TimedFrame
from tango_runtime.video.yuv import HardwareError, YuvFrame

_log = logging.getLogger("tango_runtime.video")

#: A frame of at least so many times the pixels that the vision graph takes is large.
_LARGE = 2

#: Large frames that are copied to pinned memory at a time, each on its own thread, while the GPU reads as many.
_AT_ONCE = 2


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


class FrameLoader:
    """Makes a video's frames what the vision graph takes.

    Args:
        stream: The stream of the vision graph.
        pool: Memory on the device.
        nvdec: Whether the GPU decodes video files that it can decode. Not by default: its frames have not been compared
            with software's on a GPU yet.
    """

    def __init__(self, stream: Stream, pool: Pool, *, nvdec: bool = False) -> None:
        self._stream, self._pool, self._nvdec = stream, pool, nvdec
        self._batches, self._staging = HostPool(), HostPool()
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
            decoded = stream.decode_on(check(cudart().cudaGetDevice()))
            if decoded is None:
                return None
            for i, frame in decoded:
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
        for i, (time, frame) in enumerate(self._staged(timed)):
            self._enqueue(frame, rows(resized, i, i + 1))
            seconds.append(time)
            # A caller's memory may be gone when the next frame comes, and no more than a few frames are to be pinned.
            if isinstance(frame, DeviceArray) or i % _AT_ONCE == _AT_ONCE - 1:
                self._stream.synchronize()
        self._stream.synchronize()
        return FrameBatch(resized, np.array(seconds, np.float32), aspect)

    def _staged(self, timed: Iterable[TimedFrame]) -> Iterator[tuple[float, Frame | DeviceArray]]:
        """Frames in pinned memory or on the device, copied some frames ahead."""
        ahead: deque[tuple[float, Future[Frame | DeviceArray]]] = deque()
        with ThreadPoolExecutor(_AT_ONCE) as threads:
            for time, frame in timed:
                if len(ahead) == _AT_ONCE:
                    earlier, staged = ahead.popleft()
                    yield earlier, staged.result()
                ahead.append((time, threads.submit(self._stage, frame)))
            for earlier, staged in ahead:
                yield earlier, staged.result()

    def _stage(self, frame: Frame) -> Frame | DeviceArray:
        check_frame(frame)
        if is_on_device(frame):
            check(cudart().cudaDeviceSynchronize())  # whatever stream makes it
            return DeviceArray.of(frame, "a frame")
        pinned = self._staging.take(frame.shape, np.uint8)
        np.copyto(pinned, frame)
        return pinned

    def _enqueue(self, frame: Frame | DeviceArray, resized: DeviceArray) -> None:
        """Resizes a frame on the stream into [1, H, W, 3]."""
        if not isinstance(frame, DeviceArray):
            source = self._pool.take("source frame", frame.shape, np.uint8)
            self._stream.upload(frame, source)
            frame = source
        height, width, _ = frame.shape
        shape = {"format": RGB24, "rows": height, "columns": width, "pitch": 3 * width}
        self._enqueue_shape(shape, (height, width), frame.address, None, resized)

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
        shape = TangoResizeShape(frames=1, **source, **out)
        workspace = self._pool.take("resize", (workspace_bytes(shape),), np.uint8)
        enqueue(shape, image, chroma, resized, workspace, self._stream.handle)
