"""Frames of a stream as they come: a recording is read when frames are wanted, a camera by a thread of its own."""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any, Protocol, cast

import numpy as np

from tango_plugins import TangoError
from tango_plugins.device_array import is_on_device
from tango_runtime.util.numbers import is_number
from tango_runtime.video import Frame, LiveSource, Source, TimedFrame, open_source
from tango_runtime.video.address import is_live
from tango_runtime.video.frames import check_pair, copy_frame

#: Seconds that closing waits for a thread that may be waiting for its camera.
_CLOSING = 1.0


@dataclass(frozen=True, eq=False)
class Arrival:
    """A frame of a stream.

    Attributes:
        seconds: When it is, on the stream's clock.
        frame: uint8 RGB [H, W, 3].
        at: When it came, by :func:`time.monotonic`; None for a recording.
    """

    seconds: float
    frame: Frame
    at: float | None = None


class Feed(Protocol):
    """Frames of a stream at a rate.

    Attributes:
        live: Frames come by themselves.
        dropped: Frames that were given up, because newer ones had come.
    """

    live: bool
    dropped: int

    def take(self, wait: float | None = None, most: int | None = None) -> list[Arrival]:
        """The frames that came since the last call, oldest first.

        Args:
            wait: Most seconds to wait for a first one; None for any time.
            most: Most frames; None for all. The others wait for the next call.

        Returns:
            The frames; none where nothing came, or the stream is over.

        Raises:
            Exception: What the source raised, once its frames have been taken.
        """

    @property
    def over(self) -> bool:
        """Whether nothing will come any more."""

    def close(self) -> None:
        """Stops reading."""


class Rate:
    """Chooses frames at a rate: the first of every 1 / fps seconds since the first frame.

    Args:
        fps: Frames a second.

    Raises:
        TangoError: It is not a positive number.
    """

    def __init__(self, fps: float) -> None:
        if not is_number(fps) or not 0 < fps < math.inf:
            raise TangoError(f"fps is {fps!r}", "it must be a positive number of frames per second")
        self.fps = fps
        self._first = self._before = math.inf
        self._slot = -1

    def takes(self, seconds: float) -> bool:
        """Whether the next frame of the stream is chosen. A clock that steps back begins anew."""
        if seconds < self._before:
            self._first, self._slot = seconds, -1
        self._before = seconds
        slot = math.floor((seconds - self._first) * self.fps + 1e-6)
        chosen = slot > self._slot
        self._slot = max(slot, self._slot)
        return chosen


class RecordedFeed:
    """Gives every chosen frame, one at a time, when it is asked for."""

    live, dropped = False, 0

    def __init__(self, frames: Iterator[TimedFrame]) -> None:
        self._frames, self.over = frames, False

    def take(self, wait: float | None = None, most: int | None = None) -> list[Arrival]:
        """The next frame."""
        for seconds, frame in self._frames:
            return [Arrival(seconds, frame)]
        self.over = True
        return []

    def close(self) -> None:
        """Stops reading."""
        self.over = True


class CameraFeed:
    """Reads a camera on a thread of its own, and holds the newest chosen frames until they are taken.

    Args:
        frames: The camera; it may reuse one buffer for all frames. A context manager is entered by the thread.
        rate: Chooses frames.
        room: Most frames that wait; the oldest make room for new ones, and count as dropped.
        on_arrival: Called on that thread when a frame came, and at the end.
    """

    live = True

    def __init__(
        self, frames: Iterable[Any], rate: Rate, room: int, on_arrival: Callable[[], None] = lambda: None
    ) -> None:
        self.dropped = 0
        self._rate, self._on_arrival = rate, on_arrival
        self._news = threading.Condition()
        self._waiting: deque[Arrival] = deque(maxlen=room)
        self._ended = self._closed = False
        self._error: Exception | None = None
        self._source = frames
        self._thread = threading.Thread(target=self._read, name="tango-camera", daemon=True)
        self._thread.start()

    def take(self, wait: float | None = None, most: int | None = None) -> list[Arrival]:
        """The frames that wait, oldest first."""
        with self._news:
            self._news.wait_for(lambda: self._waiting or self._ended, wait)
            count = len(self._waiting) if most is None else min(most, len(self._waiting))
            found = [self._waiting.popleft() for _ in range(count)]
        if not found and self._error is not None:
            raise self._error
        return found

    @property
    def waiting(self) -> int:
        """Frames that wait to be taken."""
        return len(self._waiting)

    @property
    def lag(self) -> float:
        """Seconds that the oldest frame has waited; 0 where none waits."""
        with self._news:
            oldest = self._waiting[0].at if self._waiting else None
        return 0.0 if oldest is None else monotonic() - oldest

    @property
    def over(self) -> bool:
        """Whether the camera ended, and all its frames were taken."""
        return self._ended and not self._waiting

    def close(self) -> None:
        """Stops reading; a thread that waits for its camera ends when that gives a frame."""
        self._closed = True
        if callable(close := getattr(self._source, "close", None)) and not isinstance(self._source, Generator):
            # Aside: it may wait for a stream that hangs. A generator cannot be closed while the thread runs it.
            threading.Thread(target=close, name="tango-camera-end", daemon=True).start()
        self._thread.join(_CLOSING)

    def _read(self) -> None:
        manager = hasattr(self._source, "__enter__")
        opened = cast("AbstractContextManager[object]", self._source) if manager else nullcontext()
        try:
            with opened:
                self._read_on()
        except Exception as error:  # raised where frames are taken
            self._error = error
        with self._news:
            self._ended = True
            self._news.notify_all()
        self._on_arrival()

    def _read_on(self) -> None:
        numbered = -1
        for number, seconds, frame in _checked(self._source):
            if self._closed:
                return
            if number is not None:  # chosen already; what is missing was lost on the way
                self.dropped += max(number - numbered - 1, 0)
                numbered = number
            elif not self._rate.takes(seconds):
                continue
            self._hold(Arrival(seconds, copy_frame(frame), monotonic()))

    def _hold(self, arrival: Arrival) -> None:
        with self._news:
            self.dropped += len(self._waiting) == self._waiting.maxlen
            self._waiting.append(arrival)
            self._news.notify_all()
        self._on_arrival()


def open_feed(
    source: Source | Iterable[Any],
    fps: float,
    room: int,
    *,
    drop: bool | None = None,
    on_arrival: Callable[[], None] = lambda: None,
) -> Feed:
    """Opens a stream.

    Args:
        source: A video file, a folder, an array, a sequence or a FrameSource, which are recordings; or the address of a
            live stream, or any other iterable of (seconds, frame), which are cameras. Items (number, seconds, frame),
            as a LiveSource has them, were chosen already: all are taken, and missing numbers count as dropped.
        fps: Frames a second that are chosen; of a folder or an array, also how far its frames are apart.
        room: Most frames of a camera that wait.
        drop: Whether frames are given up when newer ones come. By default a camera's are, a recording's are not.
        on_arrival: Called, on another thread, when a frame of a camera came.

    Raises:
        TangoError: The source cannot be read, or ``fps`` is no rate.
    """
    if isinstance(source, str) and is_live(source):
        source = LiveSource(source, fps=fps, capacity=room)
    rate, recorded = Rate(fps), _is_recorded(source)
    frames = _recorded(cast(Source, source), fps) if recorded else cast("Iterable[Any]", source)
    if (not recorded) if drop is None else drop:
        return CameraFeed(frames, rate, room, on_arrival)
    chosen = (
        (seconds, frame) for number, seconds, frame in _checked(frames) if number is not None or rate.takes(seconds)
    )
    return RecordedFeed(chosen)


def _is_recorded(source: object) -> bool:
    if isinstance(source, (str, Path, np.ndarray, Sequence)) or is_on_device(source):
        return True
    return hasattr(source, "sample_at") and hasattr(source, "read")


def _recorded(source: Source, fps: float) -> Iterator[TimedFrame]:
    """The frames of a recording that are 1 / fps seconds apart; opened now, read later."""
    spaced = isinstance(source, np.ndarray) or is_on_device(source)
    spaced = spaced or (isinstance(source, (str, Path)) and Path(source).is_dir())
    opened = open_source(source, fps if spaced else None)
    return opened.read(opened.sample_at(fps))


def _checked(items: Iterable[Any]) -> Iterator[tuple[int | None, float, Frame]]:
    """The number, if there is one, the seconds and the frame of each item."""
    for i, item in enumerate(items):
        numbered = isinstance(item, tuple) and len(item) == 3
        yield (int(item[0]) if numbered else None, *check_pair(tuple(item[1:]) if numbered else item, i))
