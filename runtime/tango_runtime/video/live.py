"""Streams without an end: the newest frames of a camera, in constant memory, whatever the reader's speed."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from types import TracebackType
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tango_plugins import TangoError
from tango_runtime.video.address import STDIN, is_live, local_kind, source_name
from tango_runtime.video.gstreamer import open_csi, open_pipeline
from tango_runtime.video.preprocess import resize
from tango_runtime.video.source import Frame, Rounding, Sampled, TimedFrame, check_count, choose, duration_of
from tango_runtime.video.stream import CutError, LiveInput, Network, Picture, Pipe
from tango_runtime.video.v4l2 import Camera

_log = logging.getLogger("tango_runtime.video")

#: Seconds before a connection is tried again: at first, and at most.
_PAUSE, _LONGEST_PAUSE = 0.25, 8.0

#: Seconds by which a stream's own clock may differ from this machine's from one picture to the next.
_DRIFT = 5.0

#: Seconds by which containers round times: Matroska and FLV count milliseconds.
_ROUNDING = 1e-3

#: Least seconds from a picture to the next where a stream's own times do not ascend.
_STEP = 1e-3


class LiveFrame(NamedTuple):
    """A frame of a live source.

    Attributes:
        number: Number of the frame among all that were taken at the wanted rate, from 0; a gap shows dropped frames.
        seconds: Time since the first frame, strictly ascending, also across cuts.
        frame: uint8 RGB [H, W, 3], upright; nobody writes to it any more. H and W may change from frame to frame.
    """

    number: int
    seconds: float
    frame: Frame


class LiveSource:
    """The newest frames of a live stream: its own thread decodes, and a ring keeps frames at the wanted rate.

    Reading never holds the stream up: when the ring is full, the oldest frame leaves it for the newest. After a cut,
    the stream is connected to again, with pauses that grow; its times go on. Memory is that of ``capacity`` frames.

        with LiveSource("rtsp://camera/stream", fps=2, capacity=32) as live:
            for number, seconds, frame in live: ...    # in order of time, each frame once
            window = live.latest(16)                   # the newest 16, whoever had them before

    A window is a source of its own, which may outlive this one:
    ``llm.session([(seconds, frame) for _, seconds, frame in window], frames=16)``.

    One thread iterates; the other methods may be called from any.

    Args:
        source: ``rtsp://…``, ``http://…``, ``https://…``, ``v4l2:/dev/video0`` or that path alone, ``gst:PIPELINE``,
            ``csi:0`` or ``-`` (standard input), or what gives pictures itself.
        fps: Frames a second that are taken of the stream, 1 by default; all of them where it has fewer.
        capacity: Most frames that the ring holds, at least 1.
        stall: Seconds without a picture after which the source fails. So long may connecting take, too.
        size: (height, width) that frames are resized to as they come, as the vision graph would; None keeps their own.
        lossless: Wait for the reader where the ring is full, and drop nothing: for pipes, which can wait.
        clock: Seconds that only ascend; of this machine.

    Attributes:
        name: What messages call the source; without user, password and query.
        dropped: Frames that left the ring before anybody had them.
        reconnects: How often it was connected to again.

    Raises:
        TangoError: An argument is out of range, or the text names no live stream that is read.
    """

    def __init__(
        self,
        source: str | LiveInput,
        *,
        fps: float | None = None,
        capacity: int = 32,
        stall: float = 10.0,
        size: tuple[int, int] | None = None,
        lossless: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        for name, value in (("fps", 1.0 if fps is None else fps), ("stall", stall)):
            if not (math.isfinite(value) and value > 0):
                raise TangoError(f"{name} is {value}", "it must be a positive number")
        check_count(capacity)
        self._input = open_stream(source) if isinstance(source, str) else source
        self.name, self.dropped, self.reconnects = self._input.name, 0, 0
        self._fps, self._stall, self._size, self._clock = 1.0 if fps is None else fps, stall, size, clock
        self._capacity, self._lossless = capacity, lossless
        self._ring: deque[LiveFrame] = deque()
        self._taken, self._given = 0, -1  # frames that entered the ring; the newest number that anybody had
        self._iterated = -1
        self._changed = threading.Condition()
        self._closed = threading.Event()
        self._ended = False
        self._error: Exception | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> LiveSource:
        self._thread = threading.Thread(target=self._run, name=f"live {self.name}", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stops reading, and waits until its thread has ended: ``stall`` seconds at most, where the stream hangs."""
        self._closed.set()
        with self._changed:
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    def __iter__(self) -> Iterator[LiveFrame]:
        """Frames in order of time, each once; those that the ring has lost meanwhile are left out.

        Ends with the stream (only ``-`` and pipelines have an end) or with :meth:`close`.

        Raises:
            TangoError: The stream failed. Frames in the ring are given before.
        """
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._newest > self._iterated or self._is_over)
                found = next((frame for frame in self._ring if frame.number > self._iterated), None)
                if found is None:
                    if self._error is not None:
                        raise self._error
                    return
                self._iterated = found.number
                self._given = max(self._given, found.number)
                self._changed.notify_all()
            yield found

    def latest(self, count: int) -> list[LiveFrame]:
        """The newest ``count`` frames, the oldest of them first; waits until there are so many.

        Raises:
            TangoError: The stream failed, it or this source ended before there were so many, or ``count`` is not from
                1 to ``capacity``.
        """
        check_count(count)
        if count > self._capacity:
            raise TangoError(
                f"{count} frames were asked for of a ring of {self._capacity}", f"make it larger: capacity={count}"
            )
        with self._changed:
            self._changed.wait_for(lambda: len(self._ring) >= count or self._is_over)
            if self._error is not None:
                raise self._error
            if len(self._ring) < count:
                raise TangoError(f"{self.name} ended after {_frames(len(self._ring))}", "ask for fewer frames")
            self._given = self._newest
            self._changed.notify_all()
            return list(self._ring)[-count:]

    @property
    def _newest(self) -> int:
        return self._ring[-1].number if self._ring else -1

    @property
    def _is_over(self) -> bool:
        return self._ended or self._closed.is_set()

    def _run(self) -> None:
        error = None
        try:
            self._read()
        except Exception as failure:  # raised where frames are asked for
            error = failure
        with self._changed:
            self._ended, self._error = True, error
            self._changed.notify_all()

    def _read(self) -> None:
        times, due = _Times(exact=self._input.ends), 0
        for is_new, now, picture in self._connections():
            seconds = times.next(picture.seconds, now, is_new=is_new)
            reached = math.floor((seconds + _ROUNDING) * self._fps)
            if reached < due:
                continue
            due = reached + 1
            frame = picture.rgb()
            if not self._keep(seconds, frame if self._size is None else resize(frame, self._size)):
                return

    def _connections(self) -> Iterator[tuple[bool, float, Picture]]:
        """(whether it is the first of its connection, when it came, picture) of one connection after the other."""
        arrived, pause, reason = self._clock(), _PAUSE, "it sends no video"
        while True:
            is_new = True
            try:
                left = arrived + self._stall - self._clock()
                for picture in _until(self._closed, self._input.pictures(max(left, _PAUSE), self._closed)):
                    now = self._clock()
                    if picture is not None:
                        yield is_new, now, picture
                        is_new, pause, arrived = False, _PAUSE, self._clock()
                    elif now - arrived > self._stall:
                        break
                if self._input.ends or self._closed.is_set():
                    return
                reason = "the connection ended" if not is_new else reason
            except CutError as error:
                reason = str(error)
            left = arrived + self._stall - self._clock()
            if left <= 0:
                raise TangoError(
                    f"{self.name} gave no picture for {self._stall:g} s: {reason}",
                    "check the address and the network, and that it plays in another program",
                )
            _log.warning("%s: %s; connecting again in %.2f s", self.name, reason, min(pause, left))
            if self._closed.wait(min(pause, left)):
                return
            pause = min(2 * pause, _LONGEST_PAUSE)
            self.reconnects += 1

    def _keep(self, seconds: float, frame: Frame) -> bool:
        """Puts a frame into the ring; False once nobody wants more."""
        with self._changed:
            if self._lossless:
                self._changed.wait_for(lambda: self._closed.is_set() or not self._would_drop)
            if self._closed.is_set():
                return False
            if len(self._ring) == self._capacity:
                self.dropped += self._would_drop
                self._ring.popleft()
            self._ring.append(LiveFrame(self._taken, seconds, frame))
            self._taken += 1
            self._changed.notify_all()
            return True

    @property
    def _would_drop(self) -> bool:
        return len(self._ring) == self._capacity and self._ring[0].number > self._given


class FirstFrames:
    """A FrameSource of a live stream: its first frames at a rate, as many as are asked for, which takes their time.

    Args:
        source: As of :class:`LiveSource`.
        fps: Frames a second, 1 by default.
    """

    def __init__(self, source: str | LiveInput, fps: float | None = None) -> None:
        self._input = open_stream(source) if isinstance(source, str) else source
        self._fps, self.name = fps, self._input.name
        self._frames: list[LiveFrame] = []

    @property
    def duration(self) -> float | None:
        """Seconds from the first frame to the end of the last; None before they were taken."""
        return duration_of(self._seconds) if self._frames else None

    @property
    def frame_size(self) -> tuple[int, int] | None:
        """(height, width) in pixels of the first frame; None before it was taken."""
        if not self._frames:
            return None
        height, width, _ = self._frames[0].frame.shape
        return height, width

    def sample(self, count: int, *, rounding: Rounding = "floor") -> Sampled:
        """Takes the next ``count`` frames of the stream into memory.

        Raises:
            TangoError: The stream failed, or ended before it had so many.
        """
        with LiveSource(self._input, fps=self._fps, capacity=count, lossless=True) as live:
            self._frames = list(islice(live, count))
        return choose(self._seconds, count, rounding, self.name)

    def sample_at(self, fps: float) -> Sampled:
        """Nothing: there is no end up to which frames could be chosen.

        Raises:
            TangoError: Always.
        """
        raise TangoError(f"{self.name} has no end", "say how many frames, or watch it: llm.watch(source, question)")

    def read(self, chosen: Sampled) -> Iterator[TimedFrame]:
        """Gives the chosen frames."""
        return ((self._frames[i].seconds, self._frames[i].frame) for i in chosen.indices.tolist())

    @property
    def _seconds(self) -> NDArray[np.float64]:
        return np.array([frame.seconds for frame in self._frames])


def open_stream(source: str) -> LiveInput:
    """What gives the pictures of a live stream that a text names; it does not connect yet.

    Raises:
        TangoError: The text names no live stream that is read, or what reads it is not installed.
    """
    if not is_live(source):
        raise TangoError(
            f"{source} is no live stream", "give an address, a camera, a pipeline, or - for standard input"
        )
    if source == STDIN:
        return Pipe()
    kind, rest = local_kind(source)
    if kind == "v4l2":
        return Camera(rest, source_name(source))
    if kind:
        return (open_csi if kind == "csi" else open_pipeline)(rest, source_name(source))
    return Network(source)


class _Times:
    """Times of a stream's own clock → seconds since its first picture, ascending.

    Args:
        exact: The stream's own times count, however fast it comes; else they are held against this machine's clock.
    """

    def __init__(self, *, exact: bool) -> None:
        self._exact = exact
        self._shift: float | None = None
        self._last = self._arrived = 0.0

    def next(self, seconds: float, now: float, *, is_new: bool) -> float:
        """The time of the next picture.

        Args:
            seconds: By the stream's clock.
            now: By this machine's.
            is_new: It is the first picture of a connection.
        """
        if self._shift is None:
            self._shift = -seconds
        else:
            expected = self._last + now - self._arrived
            found = seconds + self._shift
            drifted = not self._exact and abs(found - expected) > _DRIFT
            if is_new or drifted or found <= self._last:
                self._shift = max(expected, self._last + _STEP) - seconds
        self._last, self._arrived = seconds + self._shift, now
        return self._last


def _until(closed: threading.Event, pictures: Iterable[Picture | None]) -> Iterator[Picture | None]:
    """Pictures until nobody wants more; their connection is then closed at once."""
    iterator = iter(pictures)
    try:
        for picture in iterator:
            if closed.is_set():
                return
            yield picture
    finally:
        if hasattr(iterator, "close"):
            iterator.close()


def _frames(count: int) -> str:
    return "1 frame" if count == 1 else f"{count} frames"
