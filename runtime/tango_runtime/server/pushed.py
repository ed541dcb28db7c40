"""A stream whose frames its client sends, one by one, as the page sends those of the browser's camera."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from contextlib import suppress
from time import monotonic

from tango_plugins import TangoError
from tango_runtime.video import Frame, TimedFrame

#: Frames that wait to be read; a reader of its own takes them at once.
_ROOM = 4


class PushedFrames:
    """Frames with the times at which they came, for one reader.

    Args:
        idle_seconds: After so long without a frame, the client is gone.
    """

    def __init__(self, idle_seconds: float) -> None:
        self._seconds, self._began = idle_seconds, monotonic()
        self._frames: queue.Queue[TimedFrame | None] = queue.Queue(_ROOM)

    def put(self, frame: Frame) -> bool:
        """Adds a frame; False where there is no room for it."""
        try:
            self._frames.put_nowait((monotonic() - self._began, frame))
        except queue.Full:
            return False
        return True

    def close(self) -> None:
        """Ends the stream."""
        with suppress(queue.Full):  # then its reader is not waiting, and sees that nobody wants more
            self._frames.put_nowait(None)

    def __iter__(self) -> Iterator[TimedFrame]:
        """The frames, as they come.

        Raises:
            TangoError: None came for too long.
        """
        while True:
            try:
                item = self._frames.get(timeout=self._seconds)
            except queue.Empty:
                raise TangoError(
                    f"no frame was sent for {self._seconds:g} s", "open the stream again, and send frames"
                ) from None
            if item is None:
                return
            yield item
