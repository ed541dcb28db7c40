"""A camera whose pictures, cuts and end a test decides, and a clock that stands still between them."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator

import numpy as np

from tango_plugins import TangoError
from tango_runtime.video.source import Frame
from tango_runtime.video.stream import CutError, Picture


class FakeClock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class FakeCamera:
    """A LiveInput. What a test puts into it comes out in that order, one connection after the other.

    Args:
        ends: As of a pipe: :meth:`end` is the end, not a cut.
        clock: Set to the moment of each picture, which it has arrived at; None where a test does not mind.
    """

    def __init__(self, *, ends: bool = False, clock: FakeClock | None = None) -> None:
        self.name, self.ends, self.connections = "the camera", ends, 0
        self._clock = clock
        self._waiting: queue.SimpleQueue[tuple[float | None, Picture | Exception | None]] = queue.SimpleQueue()

    def show(self, seconds: float, frame: Frame | int, *, at: float | None = None) -> None:
        """A picture, or a small gray one of a level; `at` is the moment at which it comes."""
        rgb = np.full((4, 6, 3), frame, np.uint8) if isinstance(frame, int) else frame
        self._waiting.put((at, Picture(seconds, lambda: rgb)))

    def cut(self, reason: str = "the wire was cut", *, at: float | None = None) -> None:
        """The connection is lost."""
        self._waiting.put((at, CutError(reason)))

    def fail(self, message: str, hint: str, *, at: float | None = None) -> None:
        """Nothing will ever come again."""
        self._waiting.put((at, TangoError(message, hint)))

    def silence(self, *, at: float | None = None) -> None:
        """Data that gives no picture."""
        self._waiting.put((at, None))

    def end(self) -> None:
        """The pictures of this connection end."""
        self._waiting.put((None, StopIteration()))

    def pictures(self, patience: float, closed: threading.Event) -> Iterator[Picture | None]:
        """What the test puts into it."""
        self.connections += 1
        while not closed.is_set():
            try:
                at, item = self._waiting.get(timeout=0.01)
            except queue.Empty:
                continue
            if at is not None and self._clock is not None:
                self._clock.now = at
            if isinstance(item, StopIteration):
                return
            if isinstance(item, Exception):
                raise item
            yield item
